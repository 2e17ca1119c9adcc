"""Looks for the fastest tiles of a kernel: from the default ones, and some that are quite different, to neighbours, and
on from the best of those.

What does not compile, most often for want of shared memory, is no candidate. Those of a round run one after another
under the profiler: kernels of few rows take less time than a launch.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bench.kernel_times import seconds_a_call
from bench.tune.subjects import Subject, Tiles

CALLS = 8  # of each candidate
_LIMITS = {
    "block_n": (16, 256),
    "block_m": (1, 256),
    "splits": (1, 16),
    "warps": (1, 8),
    "stages": (1, 6),
    "turn": (128, 2048),
    "rows": (16, 256),
    "span": (16, 256),
}
_TOGETHER = (
    ("block_n", "warps", 1),
    ("block_n", "splits", -1),
    ("turn", "stages", -1),
    ("span", "warps", 1),
    ("rows", "warps", 1),
)


class Candidates:
    """Tiles of one kernel, and how long each takes."""

    def __init__(self, subject: Subject, *, lock: AbstractContextManager[Any]) -> None:
        """`lock` is held while the GPU is used."""
        self._subject = subject
        self._lock = lock
        self._times: dict[Tiles, float] = {}
        self._device = jax.devices()[0].device_kind
        with lock:
            self._arguments = jax.block_until_ready(subject.arguments())

    def fastest(self, *, deadline: float, rounds: int) -> dict[Tiles, float]:
        """Seconds of all tiles that were tried, the fastest first."""
        tried: set[Tiles] = set()
        default, current = self._subject.default(self._device), self._subject.current(self._device)
        new = list(dict.fromkeys([default, current, *self._subject.others, *neighbours(current)]))
        for _ in range(rounds):
            new = [tiles for tiles in new if tiles not in tried and self._subject.takes(tiles)]
            if not new or time.monotonic() > deadline:
                break
            tried.update(new)
            compiled = self._compiled(new)
            calls = [partial(self._call, program) for program in compiled.values()]
            with self._lock:
                self._times |= dict(zip(compiled, seconds_a_call(calls, calls=CALLS), strict=True))
            best = min(self._times, key=lambda tiles: self._times[tiles], default=default)
            new = list(neighbours(best))
        return dict(sorted(self._times.items(), key=lambda item: item[1]))

    def _compiled(self, candidates: list[Tiles]) -> dict[Tiles, Any]:
        """Programs of those that compile."""
        found: dict[Tiles, Any] = {}
        for tiles in candidates:
            try:
                found[tiles] = jax.jit(self._subject.run(tiles)).lower(jnp.int32(0), *self._arguments).compile()
            except Exception as error:  # most often: shared memory
                print(f"  {self._subject.name}, {tiles}: {str(error).splitlines()[0][:120]}", flush=True)
        return found

    def _call(self, program: Any, turn: jax.Array) -> Any:
        return program(turn, *self._arguments)


def neighbours(tiles: Tiles) -> Iterator[Tiles]:
    """Tiles that differ in one size, or in two that belong together: doubled or halved, stages one more or less."""
    sizes = [name for name in dataclasses.asdict(tiles) if name in _LIMITS]
    for name, up in itertools.product(sizes, (True, False)):
        yield from _changed(tiles, {name: up})
    for one, other, sign in _TOGETHER:
        if one in sizes and other in sizes:
            for up in (True, False):
                yield from _changed(tiles, {one: up, other: up is (sign > 0)})


def _changed(tiles: Tiles, ups: dict[str, bool]) -> Iterator[Tiles]:
    sizes = dataclasses.asdict(tiles)
    for name, up in ups.items():
        sizes[name] = (
            sizes[name] + (1 if up else -1) if name == "stages" else sizes[name] * 2 if up else sizes[name] // 2
        )
        low, high = _LIMITS[name]
        if not low <= sizes[name] <= high:
            return
    yield type(tiles)(**sizes)
