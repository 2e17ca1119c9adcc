"""Counts what XLA compiles in this process, so that a compilation after start-up is seen."""

import threading

from jax import monitoring


class CompilationCounter:
    """Compilations and hits of the persistent cache since the process began to count.

    JAX reports them process-wide and keeps a listener for good, so there is one counter, `COMPILATIONS`.
    """

    def __init__(self) -> None:
        self.programs = 0  # handed to the backend, cached or not
        self.cache_hits = 0
        self.unplanned = 0  # of the programs, those of threads that `plan_this_thread` has not been called on
        self._thread = threading.local()
        monitoring.register_event_duration_secs_listener(self._on_duration)
        monitoring.register_event_listener(self._on_event)

    @property
    def cache_misses(self) -> int:
        """Programs that were really compiled."""
        return self.programs - self.cache_hits

    def plan_this_thread(self) -> None:
        """What this thread compiles is part of a start, even where an engine that is ready is in this process too."""
        self._thread.planned = True

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == "/jax/core/compile/backend_compile_duration":
            self.programs += 1
            self.unplanned += not getattr(self._thread, "planned", False)

    def _on_event(self, event: str, **kwargs: str | int) -> None:
        del kwargs
        if event == "/jax/compilation_cache/cache_hits":
            self.cache_hits += 1


COMPILATIONS = CompilationCounter()
