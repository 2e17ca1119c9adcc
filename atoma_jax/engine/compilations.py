"""Counts what XLA compiles in this process, so that a compilation after start-up is seen."""

from jax import monitoring


class CompilationCounter:
    """Compilations and hits of the persistent cache since the process began to count.

    JAX reports them process-wide and keeps a listener for good, so there is one counter, `COMPILATIONS`.
    """

    def __init__(self) -> None:
        self.programs = 0  # handed to the backend, cached or not
        self.cache_hits = 0
        monitoring.register_event_duration_secs_listener(self._on_duration)
        monitoring.register_event_listener(self._on_event)

    @property
    def cache_misses(self) -> int:
        """Programs that were really compiled."""
        return self.programs - self.cache_hits

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == "/jax/core/compile/backend_compile_duration":
            self.programs += 1

    def _on_event(self, event: str, **kwargs: str | int) -> None:
        del kwargs
        if event == "/jax/compilation_cache/cache_hits":
            self.cache_hits += 1


COMPILATIONS = CompilationCounter()
