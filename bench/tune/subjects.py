"""What is tuned: kernels at the shapes of Llama-3.1-8B, each a function of its tiles."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atoma_jax import ops
from bench.gpu_sections.attention import PAGE_SIZE, AttentionCase, random_pages
from bench.real_models import packed_weight, random_value
from pallas_kernels import attention_work, paged_attention_mosaic, paged_attention_pallas
from pallas_kernels.activations import InFields, Rows, activations, summed
from pallas_kernels.decode_combine import combined
from pallas_kernels.dense_matmul import dense_matmul
from pallas_kernels.planar_matmul import form_of, planar_matmul
from pallas_kernels.planar_weights import PlanarFormat, PlanarStack
from pallas_kernels.ternary_matmul import ternary_matmul
from pallas_kernels.tuning import (
    SCALED_WEIGHTS,
    AttentionTiles,
    MatmulTiles,
    attention_key,
    attention_tiles,
    default_attention_tiles,
    default_tiles,
    matmul_key,
    matmul_tiles,
)

Tiles = MatmulTiles | AttentionTiles
# One for each kind of key: Q4_0 takes the tiles of Q4_K.
TYPES = ("Q4_K", "bf16", "Q8_0", "ternary × int8", "W4 g128")
SHAPES = ((28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096))
ROWS = (1, 64, 512, 8, 256, 2048, 16, 32, 128, 1024)  # those that matter most first
_TURN = MatmulTiles.__dataclass_fields__["turn"].default
STACK = 8  # weights that turns go through: more than a cache holds
ATTENTION = (
    AttentionCase(heads=(32, 8, 128), rows=64, context=4096, layers=2),
    AttentionCase(heads=(32, 8, 128), rows=1, context=4096, chunk=4096, layers=2),
    AttentionCase(heads=(32, 8, 128), rows=64, context=4096, kv_dtype="fp8_e4m3", layers=2),
    AttentionCase(heads=(8, 4, 256), rows=64, context=4096, layers=2),
    AttentionCase(heads=(8, 4, 256), rows=1, context=4096, chunk=4096, layers=2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One kernel at one shape.

    Attributes:
        operation: as `pallas_kernels/tuning.py` calls it.
        key: of the shape, likewise.
        name: for people.
        default: tiles on a device where nothing was measured.
        current: tiles on a device.
        others: tiles that are tried too, too far from the default ones for their neighbours to lead there.
        arguments: arrays, made anew.
        run: the kernel with these tiles: a function of the turn and the arguments.
        least_rows: of a tile: fewer would not do.
        most_rows: more would be wasted.
    """

    operation: str
    key: str
    name: str
    default: Callable[[str], Tiles]
    current: Callable[[str], Tiles]
    others: tuple[Tiles, ...] = ()
    arguments: Callable[[], tuple[Any, ...]]
    run: Callable[[Any], Callable[..., Any]]
    least_rows: int
    most_rows: int

    def takes(self, tiles: Tiles) -> bool:
        """Whether tiles make sense here."""
        if isinstance(tiles, AttentionTiles):
            return self.least_rows <= tiles.rows <= self.most_rows
        has_turns = self.operation == "planar_matmul" and tiles.block_m < SCALED_WEIGHTS
        return self.least_rows <= tiles.block_m <= self.most_rows and (has_turns or tiles.turn == _TURN)


def subjects(*, small: bool) -> list[Subject]:
    """All of them, what matters most first; `small`: one tiny product, interpreted."""
    if small:
        return [_product("Q4_0", 1, 128, 512, count=2, interpret=True)]
    products = [
        _product(name, M, N, K, count=STACK)
        for M in ROWS
        for name in TYPES
        for N, K in SHAPES
        if M <= ops.PACKED_ROWS or name not in ("Q4_K", "Q8_0")  # which are dequantized then
    ]
    return [*map(_attention, ATTENTION), *products]


def _product(type_name: str, M: int, N: int, K: int, *, count: int, interpret: bool = False) -> Subject:
    if type_name == "bf16":
        operation, bits, group, weight = "dense_matmul", 16, 1, jax.ShapeDtypeStruct((count, N, K), jnp.bfloat16)
    else:
        weight = packed_weight(type_name.removesuffix(" × int8"), count, N, K)
        operation = "ternary_matmul" if type_name.endswith(" × int8") else "planar_matmul"
        bits, group = weight.bits, weight.group

    def run(tiles: MatmulTiles) -> Callable[..., Any]:
        def call(turn: jax.Array, x: jax.Array, weight: Any) -> jax.Array:
            index = turn % count
            if operation == "dense_matmul":
                return summed(dense_matmul(x, weight, index, tiles, interpret=interpret))
            kind = PlanarFormat(weight.bits, weight.plane, weight.group, weight.zero, weight.table)
            form = InFields(kind.plane) if operation == "ternary_matmul" else form_of(kind, tiles)
            inputs = activations(Rows(x), form, interpret=interpret).inputs
            if operation == "ternary_matmul":
                return ternary_matmul(inputs, weight.codes, weight.scales, index, kind, tiles, interpret=interpret)
            stack = PlanarStack(weight.codes, weight.scales, weight.mins, weight.scale_supers, weight.min_supers)
            return summed(planar_matmul(inputs, stack, index, kind, tiles, interpret=interpret))

        return call

    return Subject(
        operation=operation,
        key=matmul_key(M=M, N=N, K=K, bits=bits, group=group),
        name=f"{type_name}, {M} × {K} → {N}",
        default=lambda device: default_tiles(operation, M=M, N=N, K=K, bits=bits, group=group, device=device),
        current=lambda device: matmul_tiles(device, operation, M=M, N=N, K=K, bits=bits, group=group),
        arguments=lambda: (jax.random.normal(jax.random.key(0), (M, K), jnp.bfloat16), random_value(weight)),
        run=run,
        others=_of_bytes(M, N, K, bits, group) if operation == "planar_matmul" else (),
        least_rows=1 if operation == "planar_matmul" else 16,
        most_rows=max(16, min(256, 1 << (M - 1).bit_length())),
    )


def _of_bytes(M: int, N: int, K: int, bits: int, group: int) -> tuple[MatmulTiles, ...]:
    """Tiles that scale sums, for numbers of rows whose default ones scale weights."""
    few = default_tiles("planar_matmul", M=4, N=N, K=K, bits=bits, group=group)
    rows = 1 << (M - 1).bit_length()
    if not few.block_m < rows < 2 * SCALED_WEIGHTS:
        return ()
    widths = ((few.block_n, few.warps), (4 * few.block_n, 2 * few.warps))
    block_m = min(rows, SCALED_WEIGHTS // 2)
    return tuple(replace(few, block_n=block_n, block_m=block_m, warps=warps) for block_n, warps in widths)


def _attention(case: AttentionCase) -> Subject:
    """The kernel alone, over a cache that is there; work lists included."""
    N, K, H = case.heads
    backend = ops.Backend(platform="cuda", operands="bfloat16", weight_layout="planar", kernels="pallas")
    kernel = "decode" if case.chunk == 1 else "prefill"
    B, T, width = case.rows, case.rows * case.chunk, case.context // PAGE_SIZE
    shape = (case.layers, 1 + B * width, K, PAGE_SIZE, H)
    what: dict[str, Any] = {"window": np.int32(case.window), "scale": H**-0.5, "softcap": None}

    def arguments() -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(0), 3)
        pages = jax.jit(partial(random_pages, shape, case.kv_dtype, backend))(keys[0])
        table = (jax.random.permutation(keys[1], B * width).astype(jnp.int32) + 1).reshape(B, width)
        return jax.random.normal(keys[2], (T, N + 2 * K, H)), pages, table

    def run(tiles: AttentionTiles) -> Callable[..., Any]:
        def call(turn: jax.Array, qkv: jax.Array, pages: ops.KVPages, table: jax.Array) -> jax.Array:
            layer, length = turn % case.layers, jnp.full(B, case.context, jnp.int32)
            if kernel == "decode":
                parts = attention_work.decode_parts(
                    length, block=tiles.span, num_parts=B + -(-512 // K), part=None, cover_empty=True
                )
                decoded, _ = paged_attention_pallas.decode_attention(
                    *(qkv, pages, parts, tiles),
                    **what,
                    layer=layer,
                    page_table=table,
                    lengths=length,
                    writes=False,
                )
                return combined(decoded)
            start, first = jnp.arange(B, dtype=jnp.int32) * case.chunk, length - case.chunk
            count = jnp.full(B, case.chunk, jnp.int32)
            blocks = attention_work.query_blocks(start, count, first, T, size=max(1, tiles.rows * K // N))
            out = jnp.zeros((T, N, H), jnp.float32)
            by = paged_attention_pallas if tiles.kernel == "triton" else paged_attention_mosaic
            return by.ragged_attention(qkv, pages, blocks, out, tiles, layer=layer, page_table=table, **what)

        return call

    operation, dtype = f"paged_attention_{kernel}", {"fp8_e4m3": "float8_e4m3fn"}.get(case.kv_dtype, case.kv_dtype)
    sizes: dict[str, Any] = {"group": N // K, "head_dim": H}

    def default(device: str) -> AttentionTiles:
        return default_attention_tiles(operation, group=N // K, head_dim=H, operand_bytes=2, device=device)

    rows = default("").rows
    return Subject(
        operation=operation,
        key=attention_key(**sizes, kv_dtype=dtype),
        name=case.name,
        default=default,
        current=lambda device: attention_tiles(device, operation, **sizes, kv_dtype=dtype, operand_bytes=2),
        arguments=arguments,
        run=run,
        others=(paged_attention_mosaic.tiles_that_fit(H),) if kernel == "prefill" else (),
        least_rows=rows if kernel == "decode" else max(16, N // K),
        most_rows=rows if kernel == "decode" else 256,
    )
