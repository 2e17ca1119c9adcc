"""Looks into an engine and meddles with it: KV pages on the device, runners that fail, preemption at will."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import jax
import numpy as np

from atoma_jax.engine.engine import Engine
from atoma_jax.engine.plan import StepPlan
from atoma_jax.engine.runner import HostOutput, PendingOutput, Runner
from atoma_jax.engine.step import EngineState
from pallas_kernels.kv_pages import KVPages
from tests.kv_cache import poison_of


def kv_of(runner: Runner) -> tuple[np.ndarray, ...]:
    """Copies of K and V of all layers, [L, P, K, S, H], and of their scales where there are any, [L, P, K, S]."""
    assert runner._state is not None
    return tuple(np.array(array) for array in runner._state.pages if array is not None)


def set_kv(runner: Runner, kv: Sequence[np.ndarray]) -> None:
    assert runner._state is not None
    pages = KVPages(*(jax.device_put(array) for array in kv))
    runner._state = EngineState(pages=pages, sampler=runner._state.sampler)


def poison(runner: Runner, page: int, slots: slice = slice(None)) -> None:
    """Makes K and V of a page NaN."""
    kv = kv_of(runner)
    for array in kv:
        array[:, page, :, slots] = poison_of(array)
    set_kv(runner, kv)


def published(engine: Engine) -> dict[tuple[int, ...], int]:
    """Pages of the prefix cache, by all tokens up to each one's end."""
    return {tuple(tokens): page for page, tokens in engine._scheduler.pool.cache.contents()}


def preempt_one(engine: Engine, rng: Random, *, spare: int = 0) -> None:
    """Takes slot and pages from a running sequence at a moment when nothing forces it, not from the first `spare`."""
    running = engine._scheduler._running[spare:]
    if running:
        engine._scheduler._residency.preempt(rng.choice(running))


def drained(engine: Engine) -> None:
    """Asserts that nothing is left of any request."""
    assert not engine.has_work
    engine.check_integrity()
    stats = engine.scheduler_stats()
    assert (stats.num_running, stats.num_waiting, stats.pages_owned) == (0, 0, 0)
    assert stats.pages_free + stats.pages_cached == engine._scheduler.pool.num_pages - 1


class BorrowedRunner:
    """The device of another engine, which stays open when this one closes."""

    def __init__(self, runner: Runner):
        self._runner = runner

    def take_slot(self, *arguments: Any) -> None:
        self._runner.take_slot(*arguments)

    def allow(self, *arguments: Any) -> None:
        self._runner.allow(*arguments)

    def launch(self, plan: StepPlan) -> PendingOutput:
        return self._runner.launch(plan)

    def check(self) -> None:
        pass

    def when_lost(self, call: Callable[[], None]) -> None:
        pass

    def close(self) -> None:
        pass


class FailingRunner(BorrowedRunner):
    """A device that is lost at its `launches`-th step: at the launch, or when the results are read."""

    def __init__(self, runner: Runner, *, launches: int, at_read: bool):
        super().__init__(runner)
        self._left, self._at_read = launches, at_read

    def launch(self, plan: StepPlan) -> PendingOutput:
        self._left -= 1
        if self._left == 0 and not self._at_read:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        pending = super().launch(plan)
        return _Lost([], [], False, lambda call: call()) if self._left == 0 else pending


class _Lost(PendingOutput):
    def read(self) -> HostOutput:
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")
