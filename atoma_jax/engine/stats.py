"""Times and counters of an engine over a span of steps, and its gauges of one moment."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from atoma_jax.engine.scheduler import SchedulerStats
from atoma_jax.histogram import Distribution, Histogram

GAP_BOUNDS = (
    *(0.001, 0.002, 0.004, 0.006, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)  # seconds
STEP_TOKEN_BOUNDS = (1.0, *(2.0**power for power in range(3, 15)))
STEP_BOUNDS = (*(digit * 10.0**power for power in range(-4, 1) for digit in (1, 2, 5)), 10.0)  # seconds


class StepTotals(NamedTuple):
    """Steps since the start; what a span of them was like is the difference of two readings."""

    steps: int = 0
    tokens: int = 0  # positions that held one
    positions: int = 0  # computed, padding among them

    def plus(self, tokens: int, positions: int) -> "StepTotals":
        """With one step more."""
        return StepTotals(self.steps + 1, self.tokens + tokens, self.positions + positions)

    def padding_since(self, before: "StepTotals") -> float | None:
        """Share of the positions since then that were padding; None where there were none."""
        positions = self.positions - before.positions
        return 1.0 - (self.tokens - before.tokens) / positions if positions else None


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
    num_running: int  # sequences in steps, of this moment
    num_waiting: int
    kv_usage: float  # share of all pages that sequences own
    kv_waste_now: float
    host_step_seconds: Distribution
    device_step_seconds: Distribution
    step_tokens: Distribution
    inter_token_seconds: Distribution  # between steps that brought one request tokens

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
        self._host_steps = Histogram(STEP_BOUNDS)
        self._device_steps = Histogram(STEP_BOUNDS)
        self._step_tokens = Histogram(STEP_TOKEN_BOUNDS)
        self._gaps = Histogram(GAP_BOUNDS)

    def add_step(self, *, tokens: int, host: float, device: float, stats: SchedulerStats) -> None:
        """One step was committed."""
        self._steps += 1
        self.host_seconds += host
        self._device_seconds += device
        self._host_steps.add(host)
        self._device_steps.add(device)
        self._step_tokens.add(float(tokens))
        self._waste += _waste(stats)
        self._peak = max(self._peak, _usage(stats))

    def add_gaps(self, now: float, since: Mapping[float, int]) -> None:
        """Tokens came at `now`; `since` counts requests by when theirs came last. Few times, however many rows."""
        for before, count in since.items():
            self._gaps.add(now - before, count)

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
            num_running=now.num_running,
            num_waiting=now.num_waiting,
            kv_usage=_usage(now),
            kv_waste_now=_waste(now),
            host_step_seconds=self._host_steps.read(),
            device_step_seconds=self._device_steps.read(),
            step_tokens=self._step_tokens.read(),
            inter_token_seconds=self._gaps.read(),
        )


def _waste(stats: SchedulerStats) -> float:
    return stats.kv_wasted / stats.kv_allocated if stats.kv_allocated else 0.0


def _usage(stats: SchedulerStats) -> float:
    return stats.pages_owned / (stats.pages_free + stats.pages_cached + stats.pages_owned)
