"""What attention costs a step: the native kernels beside XLA's route, in alternation, and the memory that must be read.

Run as `python -m bench.attention`. Each time is the fastest of several, for all layers of a model of the shape asked.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jaxtyping import Array

from atoma_jax import ops

PAGE = 16  # tokens


class _Step(NamedTuple):
    """Where the tokens of a step lie, as `ops.attention_batch` takes it."""

    page: np.ndarray
    slot: np.ndarray
    page_table: np.ndarray
    decode_lengths: np.ndarray
    chunks: ops.Chunks | None


def main(
    contexts: Annotated[list[int] | None, typer.Argument(help="tokens of each sequence")] = None,
    heads: int = 9,
    kv_heads: int = 3,
    head_dim: int = 64,
    layers: int = 30,
    kv_dtype: str = "bfloat16",
    batches: str = "1,8,16,32",
    prefill: int = 512,
    repeats: int = 7,
) -> None:
    """Prints a table: decode of each batch at each context, then one prefill."""
    assert ops.has_native_kernels(), "the native kernels are not built"
    shape = (heads, kv_heads, head_dim, layers)
    print("| step | native, ms | XLA, ms | gain | K and V read, GB/s |\n|---|---|---|---|---|")
    for context in contexts or [128, 512, 4096]:
        for batch in map(int, batches.split(",")):
            step = _decode(batch, context)
            _row(f"decode, {batch} × {context}", shape, kv_dtype, step, batch, context, repeats)
    step = _prefill(prefill)
    _row(f"prefill of {prefill}", shape, kv_dtype, step, prefill, prefill, repeats)


def _row(
    name: str,
    shape: tuple[int, int, int, int],
    kv_dtype: str,
    step: _Step,
    tokens: int,
    context: int,
    repeats: int,
) -> None:
    N, K, H, L = shape
    rows, width = step.page_table.shape
    pages = ops.empty_pages((L, rows * width + 1, K, PAGE, H), kv_dtype, _backend("native"))
    q, k, v = (jnp.full((tokens, n, H), 0.1, jnp.float32) for n in (N, K, K))
    runs = [_program(kernels, pages, q, k, v, step) for kernels in ("native", "xla")]
    native, xla = _alternate(runs, repeats)
    read = sum(part.nbytes for part in pages if part is not None) / pages.k.shape[1] / PAGE * context * rows
    print(
        f"| {name} | {native * 1e3:.2f} | {xla * 1e3:.2f} | {xla / native:.1f} | {read / native / 1e9:.1f} |",
        flush=True,
    )


def _program(kernels: ops.Kernels, pages: ops.KVPages, q: Array, k: Array, v: Array, step: _Step) -> Callable[[], None]:
    """All layers, one after the other, over a cache of their own."""
    backend = _backend(kernels)

    @partial(jax.jit, donate_argnums=0)
    def run(pages: ops.KVPages, q: Array) -> tuple[ops.KVPages, Array]:
        places = {name: jnp.asarray(array) for name, array in step._asdict().items() if name != "chunks"}
        batch = ops.attention_batch(pages, q.shape[1], backend, **places, chunks=step.chunks, fixed_parts=False)

        def layer(carry: tuple[ops.KVPages, Array], index: Array) -> tuple[tuple[ops.KVPages, Array], None]:
            pages, q = carry
            window, scale = jnp.int32(1 << 30), q.shape[-1] ** -0.5
            out, pages = ops.attend(
                q, k, v, pages, batch, backend, layer=index, window=window, scale=scale, softcap=None
            )
            return (pages, q + ops.computed(out, backend).reshape(q.shape)), None

        return jax.lax.scan(layer, (pages, q), jnp.arange(pages.k.shape[0], dtype=jnp.int32))[0]

    held = [jax.tree.map(jnp.copy, pages)]

    def call() -> None:
        held[0], out = run(held[0], q)
        jax.block_until_ready(out)

    call()
    return call


def _backend(kernels: ops.Kernels) -> ops.Backend:
    return ops.Backend(platform="cpu", operands="float32", weight_layout="rows", kernels=kernels)


def _alternate(runs: list[Callable[[], None]], repeats: int) -> list[float]:
    """Seconds of the fastest run of each."""
    fastest = [float("inf")] * len(runs)
    for _ in range(repeats):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            fastest[i] = min(fastest[i], time.perf_counter() - start)
    return fastest


def _tables(rows: int, context: int) -> np.ndarray:
    """Pages of each row, shuffled."""
    width = -(-context // PAGE)
    return np.random.default_rng(0).permutation(np.arange(1, rows * width + 1)).reshape(rows, width).astype(np.int32)


def _decode(rows: int, context: int) -> _Step:
    table = _tables(rows, context)
    return _Step(
        page=table[:, (context - 1) // PAGE],
        slot=np.full(rows, (context - 1) % PAGE, np.int32),
        page_table=table,
        decode_lengths=np.full(rows, context, np.int32),
        chunks=None,
    )


def _prefill(tokens: int) -> _Step:
    table, at = _tables(1, tokens), np.arange(tokens, dtype=np.int32)
    none = jnp.zeros(1, jnp.int32)
    return _Step(
        page=table[0, at // PAGE],
        slot=at % PAGE,
        page_table=table,
        decode_lengths=np.zeros(1, np.int32),
        chunks=ops.Chunks(none, none + tokens, none),
    )


if __name__ == "__main__":
    typer.run(main)
