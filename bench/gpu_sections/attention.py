"""Attention over a paged cache: right beside float64, and how fast beside XLA's own way and torch's.

One call of each case is what a layer of the engine does: K and V are written into their pages, then attended to, over
enough layers that no cache of the device holds them. Which kernel that is, tuned tiles say; prefill has one that is
also measured where they do not say so. Where Pallas attends, its kernels alone are timed: around them XLA joins
queries, K and V for every layer, which in a model is part of what rotates them, and makes work lists, which are there
once for all layers.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from atoma_jax import ops
from bench.gpu_sections.protocol import Context, Measurement
from bench.kernel_times import seconds_a_call
from pallas_kernels import kv_pages, kv_write_pallas, paged_attention_mosaic
from pallas_kernels.attention_work import query_blocks

PAGE_SIZE, TRIALS, MARGIN = 16, 3, 2e-4  # MARGIN: float32 sums of thousands of terms
ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11, "fp8_e4m3": 2.0**-11, "int8": 2.0**-8}
NO_WINDOW = 1 << 30
CHECKED = 8  # tokens of a case, of one head each
WITH_PEERS = 2  # cases that others run too: those with pass marks
_OURS = "^(paged_attention|write_kv)"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """Sequences of one length: each decodes a token, or prefills its last `chunk` tokens."""

    heads: tuple[int, int, int]  # query heads, kv heads, head dim
    rows: int
    context: int
    chunk: int = 1
    kv_dtype: str = "bfloat16"
    window: int = NO_WINDOW
    layers: int = 8
    by_mosaic: bool = False  # of a prefill: by that kernel, whatever tiles were tuned

    @property
    def name(self) -> str:
        """For people."""
        N, K, H = self.heads
        what = "decode" if self.chunk == 1 else f"prefill of {self.chunk}"
        window = "" if self.window == NO_WINDOW else f", window {self.window}"
        kernel = ", by Mosaic GPU" if self.by_mosaic else ""
        return f"{what}, {self.rows} × {self.context}, {N}/{K} heads of {H}, {self.kv_dtype}{window}{kernel}"

    @property
    def bytes_read(self) -> int:
        """Of K, V and their scales by one layer of a decode."""
        _, K, H = self.heads
        itemsize = kv_pages.FORMATS[self.kv_dtype].codes.dtype.itemsize
        vector = H * itemsize + (4 if kv_pages.FORMATS[self.kv_dtype].largest else 0)
        return 2 * self.rows * min(self.context, self.window) * K * vector

    @property
    def operations(self) -> int:
        """Multiplications and additions of one layer's two products."""
        N, _, H = self.heads
        first = self.context - self.chunk
        seen = sum(min(position + 1, self.window) for position in range(first, self.context))
        return 4 * N * H * self.rows * seen


LLAMA, GEMMA = (32, 8, 128), (8, 4, 256)
CASES = [  # those that have pass marks first
    AttentionCase(heads=LLAMA, rows=64, context=4096),
    AttentionCase(heads=LLAMA, rows=1, context=4096, chunk=4096),
    AttentionCase(heads=LLAMA, rows=1, context=4096, chunk=4096, by_mosaic=True),
    AttentionCase(heads=LLAMA, rows=1, context=4096, layers=32),
    AttentionCase(heads=LLAMA, rows=1, context=32768),
    AttentionCase(heads=LLAMA, rows=8, context=4096, layers=16),
    AttentionCase(heads=LLAMA, rows=256, context=1024),
    AttentionCase(heads=LLAMA, rows=64, context=4096, kv_dtype="fp8_e4m3", layers=4),
    AttentionCase(heads=LLAMA, rows=64, context=4096, kv_dtype="int8", layers=4),
    AttentionCase(heads=GEMMA, rows=64, context=4096, window=1024),
    AttentionCase(heads=LLAMA, rows=4, context=2048, chunk=512),
    AttentionCase(heads=LLAMA, rows=1, context=16384, chunk=2048),
    AttentionCase(heads=GEMMA, rows=1, context=4096, chunk=4096, window=1024),
    AttentionCase(heads=LLAMA, rows=4, context=2048, chunk=500, by_mosaic=True),
    AttentionCase(heads=GEMMA, rows=1, context=4096, chunk=4096, window=1024, by_mosaic=True),
]
TARGETS = {CASES[0].name: 0.80, CASES[1].name: 0.55}
_TINY = [
    AttentionCase(heads=(4, 2, 64), rows=2, context=100, layers=2),
    AttentionCase(heads=(4, 2, 64), rows=2, context=100, chunk=40, kv_dtype="int8", window=30, layers=2),
]


def measure(context: Context) -> Iterator[Measurement]:
    """Every case. An `error` of 1 is what rounding may do."""
    for case in _TINY if context.small else CASES:
        try:
            seconds, error = _measured(case, context)
        except Exception as failure:
            if not case.by_mosaic:
                raise
            print(f"  {case.name}: {type(failure).__name__}: {str(failure)[:200]}", file=sys.stderr)  # no Hopper
            continue
        others = {"xla": lambda case=case: _xla_seconds(case), "torch": lambda case=case: _torch_seconds(case)}
        with_peers = not context.small and case in CASES[:WITH_PEERS]
        times = {name: _attempt(name, peer) for name, peer in others.items()} if with_peers else {}
        decodes = case.chunk == 1
        yield Measurement(
            name=case.name,
            seconds=seconds / case.layers,
            moved_bytes=case.bytes_read if decodes else 0,
            operations=case.operations,
            others={name: seconds for name, seconds in times.items() if seconds is not None},
            error=error,
            allowed=1.0,
            target=TARGETS.get(case.name),
            fraction_of="bandwidth" if decodes else "peak",
        )


def _measured(case: AttentionCase, context: Context) -> tuple[float, float]:
    """Seconds of all layers, and how wrong the last one is."""
    run, pages, inputs = _prepared(case, context.kernels, case.layers)
    seconds, out, pages = _timed(run, pages, inputs, 1 if context.small else TRIALS, _OURS)
    return seconds, _error(case, out, pages, inputs)


def _prepared(case: AttentionCase, kernels: ops.Kernels, layers: int) -> tuple[Callable[..., Any], Any, Any]:
    """The jitted step, a cache full of random numbers, and the rest of the step's inputs."""
    N, K, H = case.heads
    platform = "cpu" if jax.default_backend() == "cpu" else "cuda"
    backend = ops.Backend(
        platform=platform,
        operands="bfloat16",
        weight_layout="planar",
        kernels=kernels,
        device=jax.devices()[0].device_kind,
    )
    width, T = -(-case.context // PAGE_SIZE), case.rows * case.chunk
    keys = iter(jax.random.split(jax.random.key(time.time_ns() % (1 << 31)), 8))
    shape = (layers, case.rows * width + 1, K, PAGE_SIZE, H)
    pages = jax.jit(partial(random_pages, shape, case.kv_dtype, backend))(next(keys))
    order = jax.random.permutation(next(keys), shape[1] - 1).astype(jnp.int32) + 1
    table = order.reshape(case.rows, width)
    position = jnp.tile(jnp.arange(case.context - case.chunk, case.context, dtype=jnp.int32), case.rows)
    row = jnp.repeat(jnp.arange(case.rows, dtype=jnp.int32), case.chunk)
    new = [jax.random.normal(next(keys), (T, heads, H)) for heads in (N, K, K)]
    start = jnp.arange(case.rows, dtype=jnp.int32) * case.chunk
    first = jnp.full(case.rows, case.context - case.chunk, jnp.int32)
    decodes = case.chunk == 1

    def step(pages: ops.KVPages, q: Array, k: Array, v: Array, table: Array) -> tuple[Array, ops.KVPages]:
        chunks = ops.Chunks(start, jnp.full_like(start, case.chunk), first)
        batch = ops.attention_batch(
            pages,
            N,
            backend,
            page=table[row, position // PAGE_SIZE],
            slot=position % PAGE_SIZE,
            page_table=table,
            decode_lengths=first + 1 if decodes else jnp.zeros_like(first),
            chunks=None if decodes else chunks,
            fixed_parts=False,
        )

        def layer(carry: tuple[Array, ops.KVPages], index: Array) -> tuple[tuple[Array, ops.KVPages], None]:
            _, pages = carry  # each layer waits for the one before it, as in a model
            what: dict[str, Any] = {"layer": index, "window": jnp.int32(case.window), "scale": H**-0.5, "softcap": None}
            if case.by_mosaic:
                return _by_mosaic(q, k, v, pages, batch, chunks, what), None
            out, pages = ops.attend(q, k, v, pages, batch, backend, **what)
            return (ops.computed(out, backend).reshape(q.shape), pages), None

        return jax.lax.scan(layer, (jnp.zeros_like(q), pages), jnp.arange(layers, dtype=jnp.int32))[0]

    return jax.jit(step, donate_argnums=0), pages, (*new, table)


def _by_mosaic(
    q: Array,
    k: Array,
    v: Array,
    pages: ops.KVPages,
    batch: ops.AttentionBatch,
    chunks: ops.Chunks,
    what: dict[str, Any],
) -> tuple[Array, ops.KVPages]:
    """`ops.attend` of sequences that prefill, by the kernel of Mosaic GPU with the tiles that tuning starts from."""
    tiles = paged_attention_mosaic.tiles_that_fit(q.shape[2])
    size = tiles.rows // (q.shape[1] // k.shape[1])
    blocks = query_blocks(*chunks, q.shape[0], size=size)
    qkv = jnp.concatenate([q, k, v], axis=1)
    pages = kv_write_pallas.write_kv(pages, qkv, layer=what["layer"], page=batch.page, slot=batch.slot)
    what = what | {"page_table": batch.page_table}
    return paged_attention_mosaic.ragged_attention(qkv, pages, blocks, jnp.zeros(q.shape), tiles, **what), pages


def random_pages(shape: tuple[int, int, int, int, int], kv_dtype: str, backend: ops.Backend, key: Array) -> ops.KVPages:
    """A cache whose every slot holds normal numbers."""
    empty = ops.empty_pages(shape, kv_dtype, backend)
    form = kv_pages.format_of(empty)
    keys = iter(jax.random.split(key, shape[0] * 2))

    def filled(cache: Array) -> Array:
        def layer() -> Array:
            values = jax.random.normal(next(keys), shape[1:])
            return kv_pages.encode(
                values * (1 if form.largest is None else form.largest / 4), form._replace(largest=None)
            )[0]

        return jnp.stack([layer() for _ in range(shape[0])]).astype(cache.dtype)

    scales = None if form.largest is None else jnp.full(shape[:-1], 4 / form.largest, jnp.float32)
    return ops.KVPages(filled(empty.k), filled(empty.v), scales, scales)


def _timed(
    run: Callable[..., Any], pages: Any, inputs: Any, trials: int, kernels: str = ""
) -> tuple[float, Array, Any]:
    """Seconds of a run's kernels whose names match; the output, and the cache."""
    held = list(run(pages, *inputs))

    def again(_: Array) -> Array:
        held[:] = run(held[1], *inputs)
        return held[0]

    [seconds] = seconds_a_call([again], calls=trials, kernels=kernels)
    return seconds, held[0], held[1]


def _error(case: AttentionCase, out: Array, pages: ops.KVPages, inputs: Any) -> float:
    """Of some tokens of the last layer: the largest distance to float64, as a share of what rounding allows."""
    q, _, _, table = inputs
    N, K, _ = case.heads
    form, rng, worst = kv_pages.format_of(pages), np.random.default_rng(), 0.0
    for token in rng.choice(out.shape[0], min(CHECKED, out.shape[0]), replace=False):
        row, position = token // case.chunk, case.context - case.chunk + token % case.chunk
        at = np.arange(max(0, position - case.window + 1), position + 1)
        head = int(rng.integers(N))
        page, slot, kv_head = table[row][at // PAGE_SIZE], at % PAGE_SIZE, head // (N // K)

        def read(cache: Array, scales: Array | None, where: Any = (page, kv_head, slot)) -> np.ndarray:
            values = np.asarray(kv_pages.decode(cache[-1][where], form).astype(jnp.float32), np.float64)
            return values if scales is None else values * np.asarray(scales[-1][where], np.float64)[:, None]

        operand = {"int8": jnp.bfloat16, "fp8_e4m3": jnp.float16}.get(case.kv_dtype, form.codes)
        query = np.asarray(q[token, head].astype(operand).astype(jnp.float32), np.float64)
        k, v = read(pages.k, pages.k_scale), read(pages.v, pages.v_scale)
        logits = k @ query * case.heads[2] ** -0.5
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        allowed = ROUNDING[case.kv_dtype] * (weights @ np.abs(v)) + MARGIN
        # Python's maximum would pass over a NaN.
        worst = float(np.maximum(worst, np.max(np.abs(np.asarray(out[token, head]) - weights @ v) / allowed)))
    return worst


def _xla_seconds(case: AttentionCase) -> float:
    """Of one layer by XLA's own way."""
    run, pages, inputs = _prepared(replace(case, layers=1), "xla", 1)
    return _timed(run, pages, inputs, 2)[0]


def _torch_seconds(case: AttentionCase) -> float:
    """Of one layer by torch's attention, over K and V that lie in one piece, where torch has a GPU."""
    import torch

    if case.kv_dtype != "bfloat16" or case.window != NO_WINDOW or 1 < case.chunk < case.context:
        raise NotImplementedError("torch's attention has no such case")
    N, K, H = case.heads
    q, k, v = (
        torch.randn(case.rows, heads, tokens, H, dtype=torch.bfloat16, device="cuda")
        for heads, tokens in ((N, case.chunk), (K, case.context), (K, case.context))
    )
    attend = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=case.chunk > 1, enable_gqa=True)
    best = float("inf")
    for _ in range(TRIALS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(8):
            attend(q, k, v)
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begin) / 8)
    return best


def _attempt(name: str, seconds: Callable[[], float]) -> float | None:
    """None where a peer cannot run a case, or is not there."""
    try:
        return seconds()
    except Exception as error:  # a peer's failure is no failure of ours
        print(f"  no {name}: {type(error).__name__}: {str(error)[:120]}", file=sys.stderr)
        return None
