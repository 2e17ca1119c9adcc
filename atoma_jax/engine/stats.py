"""Times and counters of an engine over a span of steps."""

from dataclasses import dataclass

from atoma_jax.engine.scheduler import SchedulerStats


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A reading."""

    steps: int
    host_seconds: float  # planning, packing, committing, text: not waiting for the device
    device_seconds: float  # waiting for the device
    kv_waste: float  # mean share of the allocated KV that holds nothing
    peak_kv_usage: float  # largest share of all pages in use
    preemptions: int
    prefix_hit_tokens: int
    prefix_queried_tokens: int
    recompilations: int  # programs compiled after start-up
    prompt_tokens: int
    generation_tokens: int

    @property
    def host_ms_per_step(self) -> float:
        """Mean host time of a step, in milliseconds."""
        return 1e3 * self.host_seconds / self.steps if self.steps else 0.0


class StatsRecorder:
    """Adds up while the engine runs."""

    def __init__(self, since: SchedulerStats | None = None):
        """Counters of the scheduler count from `since`."""
        self._since = since
        self.host_seconds = 0.0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self._steps = 0
        self._device_seconds = 0.0
        self._waste = 0.0
        self._peak = 0.0

    def add_step(self, *, host: float, device: float, stats: SchedulerStats) -> None:
        """One step was committed."""
        self._steps += 1
        self.host_seconds += host
        self._device_seconds += device
        self._waste += stats.kv_wasted / stats.kv_allocated if stats.kv_allocated else 0.0
        pages = stats.pages_free + stats.pages_cached + stats.pages_owned
        self._peak = max(self._peak, stats.pages_owned / pages)

    def read(self, now: SchedulerStats, recompilations: int) -> EngineStats:
        """The reading of this moment."""
        since = self._since
        return EngineStats(
            steps=self._steps,
            host_seconds=self.host_seconds,
            device_seconds=self._device_seconds,
            kv_waste=self._waste / self._steps if self._steps else 0.0,
            peak_kv_usage=self._peak,
            preemptions=now.num_preemptions - (since.num_preemptions if since else 0),
            prefix_hit_tokens=now.prefix_hit_tokens - (since.prefix_hit_tokens if since else 0),
            prefix_queried_tokens=now.prefix_queried_tokens - (since.prefix_queried_tokens if since else 0),
            recompilations=recompilations,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
        )
