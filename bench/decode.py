"""How fast one core takes each ggml tensor type apart, and the most memory it needs: `python -m bench.decode`.

Blocks are random, in chunks of the loader's size; times are the thread's CPU time, which other processes on the machine
do not change much. `decode` is what loading a quantized weight takes, `dequantize` what a dense one takes.
"""

import time
import tracemalloc
from collections.abc import Callable
from typing import Annotated

import numpy as np
import typer

from atoma_jax.quant.ggml import GROUP_FORMATS, decode, dequantize
from atoma_jax.quant.ggml_types import BLOCK_SIZES, GGMLType

N, K = 1024, 4096


def main(types: Annotated[list[str] | None, typer.Argument()] = None, repeats: int = 5) -> None:
    """Prints a table of the types named, such as Q4_K, or of all."""
    print("| type | decode, M elements/s | peak, bytes an element | dequantize, M elements/s |\n|---|---|---|---|")
    for kind in [GGMLType[name] for name in types] if types else GROUP_FORMATS:
        elements, size = BLOCK_SIZES[kind]
        raw = np.random.default_rng(0).integers(0, 256, (N, K // elements * size), dtype=np.uint8)
        taken, floats = (N * K / _fastest(work, raw, kind, repeats) / 1e6 for work in (decode, dequantize))
        print(f"| {kind.name} | {taken:.0f} | {_peak(raw, kind) / N / K:.2f} | {floats:.0f} |")


def _fastest(work: Callable[[np.ndarray, GGMLType], object], raw: np.ndarray, kind: GGMLType, repeats: int) -> float:
    """Seconds of the fastest of several runs."""
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.thread_time()
        work(raw, kind)
        seconds.append(time.thread_time() - start)
    return min(seconds)


def _peak(raw: np.ndarray, kind: GGMLType) -> int:
    """The most bytes that decoding holds at once, its result included."""
    tracemalloc.start()
    decode(raw, kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


if __name__ == "__main__":
    typer.run(main)
