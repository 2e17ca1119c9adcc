"""How long kernels run on a GPU, from JAX's profiler: the device's own clock, without gaps between launches. What takes
less time than a launch cannot be timed otherwise.
"""

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

_MARK = "mark_between_programs"


class KernelTime(NamedTuple):
    """One launch."""

    kernel: str
    start_ns: float
    seconds: float


def kernel_times(run: Callable[[], Any]) -> list[KernelTime]:
    """Kernels that `run` launches, in the order in which they began; none where no GPU is."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        [path] = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    found = [
        KernelTime(event.name, event.start_ns, event.duration_ns * 1e-9)
        for plane in data.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if (line.name or "").startswith("Stream")
        for event in line.events
    ]
    return sorted(found, key=lambda one: one.start_ns)


def seconds_by_kernel(times: Sequence[KernelTime]) -> dict[str, float]:
    """Seconds of all launches of each kernel, the longest first."""
    total: dict[str, float] = {}
    for one in times:
        total[one.kernel] = total.get(one.kernel, 0.0) + one.seconds
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def seconds_a_call(programs: Sequence[Callable[[jax.Array], Any]], *, calls: int, kernels: str = "") -> list[float]:
    """Seconds of kernels of one call of each program, compiled before; without a GPU, of a call as a clock sees it.

    Args:
        programs: functions of the number of the call, an array.
        calls: of each, one after the other.
        kernels: a regular expression: of the names of those that count.
    """
    numbers = [jnp.int32(i) for i in range(calls)]
    for program in programs:
        jax.block_until_ready(program(numbers[0]))
    if jax.default_backend() != "gpu":
        return [_wall_seconds(program, numbers) for program in programs]
    mark, word = jax.jit(_mark), jnp.zeros((32,), jnp.int32)
    jax.block_until_ready(mark(word))

    def run() -> Any:
        out = None
        for program in programs:
            out = mark(word)
            for number in numbers:
                out = program(number)
        return out

    segments: list[float] = []
    for one in kernel_times(run):
        if _MARK in one.kernel:
            segments.append(0.0)
        elif segments and re.search(kernels, one.kernel):
            segments[-1] += one.seconds / calls
    assert len(segments) == len(programs), "the profiler lost launches"
    return segments


def _wall_seconds(program: Callable[[jax.Array], Any], numbers: Sequence[jax.Array]) -> float:
    begin = time.perf_counter()
    for number in numbers:
        jax.block_until_ready(program(number))
    return (time.perf_counter() - begin) / len(numbers)


def _mark(word: jax.Array) -> jax.Array:
    """A kernel that stands between two programs in what the profiler sees."""

    def kernel(word_ref: Any, out_ref: Any) -> None:
        lane = jnp.arange(word.shape[0], dtype=jnp.int32)
        plt.store(out_ref.at[lane], plt.load(word_ref.at[lane]) + 1)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(word.shape, word.dtype),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        name=_MARK,
    )(word)
