"""Products with weights in the planar layout, as a Pallas kernel for NVIDIA GPUs: W4, W8 and W2, affine or by a table.

The reference is `quantized_matmul.matmul_planar`, which also says what the layout is. What is particular here:

- One program makes a tile of `block_n` out-features × `block_m` rows. Out-features are the rows of the matrix units, so
  that one row of activations wastes none of them, and the weights, unpacked, go there from registers.
- Few rows: each group's partial sum, of exact integers, is scaled in float32. From 64 rows on it is cheaper to scale
  the bfloat16 weight, which rounds scale, min and their result to bfloat16.
- Mins are subtracted as `min · Σx` of a group, with the sums of activations made once for all out-features.
- A weight is a stack of many and an index into it is an operand, so that a program reads what it needs in place: layers
  and experts are never copied out.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.tuning import MatmulTiles
from pallas_kernels.unpacking import unpack

SCALED_WEIGHTS = 64  # rows of a tile from which on weights are scaled instead of sums


class PlanarStack(NamedTuple):
    """Weights `[N, K]` in the planar layout, S of them: arrays, their shapes, or a kernel's refs."""

    words: Any  # uint16 [S, N, K·bits/16]
    scales: Any  # number [S, G, N]
    mins: Any  # likewise, or None
    scale_supers: Any  # f32 [S, supergroups, N], or None
    min_supers: Any  # likewise


class PlanarFormat(NamedTuple):
    """What codes mean; as the fields of `QTensor`."""

    bits: int
    plane: int
    group: int
    zero: int
    table: tuple[int, ...] | None

    @property
    def block(self) -> int:
        """Elements along K of one block of words."""
        return self.plane * 16 // self.bits

    @property
    def is_aligned(self) -> bool:
        """Whether groups are whole blocks, or blocks whole groups: what the kernels want."""
        return self.group % self.plane == 0 and (self.block % self.group == 0 or self.group % self.block == 0)


class _Rows(NamedTuple):
    """Rows of activations that a program reads and writes."""

    place: Int32[Array, " block_m"]
    mask: Array  # bool [block_m]


def planar_matmul(
    x: Float[Array, "M K"],
    stack: PlanarStack,
    index: Int32[Array, ""],
    kind: PlanarFormat,
    tiles: MatmulTiles,
    *,
    interpret: bool = False,
) -> Float32[Array, "M N"]:
    """x · Wᵀ for W = stack[index]; `x` is rounded to bfloat16, sums are float32.

    Args:
        x: activations.
        stack: weights.
        index: which.
        kind: their format; must be aligned.
        tiles: how the product is cut.
        interpret: run the kernel's steps as plain JAX, on any device.
    """
    M, N = x.shape[0], stack.words.shape[1]
    x, sums = _operands(x, stack, kind, tiles)
    splits, blocks = _splits(x.shape[1], kind, tiles)

    def kernel(*refs: Any) -> None:
        index_ref, x_ref, out_ref, stack_refs, sums_ref = _named(refs, stack, sums)
        rows = _some_rows(pl.program_id(0) * tiles.block_m, tiles.block_m, M)
        at = pl.program_id(1), pl.program_id(2)
        tile = _tile(x_ref, stack_refs, sums_ref, index_ref[0], rows, at, kind, tiles, blocks, not interpret)
        _store(out_ref, tile, rows, at, tiles.block_n)

    parts = pl.pallas_call(
        kernel,
        grid=(-(-M // tiles.block_m), -(-N // tiles.block_n), splits),
        out_shape=jax.ShapeDtypeStruct((splits, M, N), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=f"planar_matmul_{kind.bits}",
    )(index.reshape(1), x, *_present(stack), *([] if sums is None else [sums]))
    return parts[0] if splits == 1 else jnp.sum(parts, axis=0)


def planar_grouped_matmul(
    x: Float[Array, "padded K"],
    stack: PlanarStack,
    used: Int32[Array, ""],
    index: Int32[Array, " blocks"],
    start: Int32[Array, " blocks"],
    stop: Int32[Array, " blocks"],
    kind: PlanarFormat,
    tiles: MatmulTiles,
    *,
    most: int,
    interpret: bool = False,
) -> Float32[Array, "padded N"]:
    """Rows `start` to `stop` of each block times its own weight `stack[index]`, for the first `used` blocks.

    `most` is how many rows a block has at most. Rows of no block may hold anything.
    """
    pieces = -(-most // tiles.block_m)
    N = stack.words.shape[1]
    x, sums = _operands(x, stack, kind, tiles)
    splits, turns = _splits(x.shape[1], kind, tiles)

    def kernel(used_ref: Any, start_ref: Any, stop_ref: Any, *refs: Any) -> None:
        index_ref, x_ref, out_ref, stack_refs, sums_ref = _named(refs, stack, sums)
        piece, at = pl.program_id(0), (pl.program_id(1), pl.program_id(2))  # not inside of a condition: JAX refuses it
        block = lax.div(piece, pieces)
        start = start_ref[block] + lax.rem(piece, pieces) * tiles.block_m

        @pl.when((block < used_ref[0]) & (start < stop_ref[block]))
        def _() -> None:
            rows = _some_rows(start, tiles.block_m, stop_ref[block])
            place = index_ref[block]
            tile = _tile(x_ref, stack_refs, sums_ref, place, rows, at, kind, tiles, turns, not interpret)
            _store(out_ref, tile, rows, at, tiles.block_n)

    parts = pl.pallas_call(
        kernel,
        grid=(index.shape[0] * pieces, -(-N // tiles.block_n), splits),
        out_shape=jax.ShapeDtypeStruct((splits, x.shape[0], N), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=f"planar_grouped_matmul_{kind.bits}",
    )(used.reshape(1), start, stop, index, x, *_present(stack), *([] if sums is None else [sums]))
    return parts[0] if splits == 1 else jnp.sum(parts, axis=0)


def _operands(
    x: Array, stack: PlanarStack, kind: PlanarFormat, tiles: MatmulTiles
) -> tuple[Array, Float32[Array, "spans M"] | None]:
    """Activations as the kernel reads them, and their sums over what shares a min, where it subtracts mins of sums."""
    assert kind.is_aligned, kind
    x = x.astype(jnp.bfloat16)
    if stack.mins is None or tiles.block_m >= SCALED_WEIGHTS:
        return x, None
    span = min(kind.group, kind.block)
    return x, jnp.sum(x.astype(jnp.float32).reshape(x.shape[0], -1, span), axis=-1).T


def _splits(K: int, kind: PlanarFormat, tiles: MatmulTiles) -> tuple[int, int]:
    """Parts that K is cut into, and blocks of words of each; the last may have fewer."""
    whole = K // kind.block
    blocks = -(-whole // tiles.splits)
    return -(-whole // blocks), blocks


def _present(stack: PlanarStack) -> list[Array]:
    return [part for part in stack if part is not None]


def _named(refs: tuple[Any, ...], stack: PlanarStack, sums: Array | None) -> tuple[Any, Any, Any, PlanarStack, Any]:
    """Refs of a kernel by name: index, activations, output, weights (None where the stack has none), sums."""
    index_ref, x_ref, *rest, out_ref = refs
    parts = [None if part is None else rest.pop(0) for part in stack]
    return index_ref, x_ref, out_ref, PlanarStack(*parts), rest.pop(0) if sums is not None else None


def _some_rows(start: Any, block_m: int, stop: Any) -> _Rows:
    index = start + lax.iota(jnp.int32, block_m)
    return _Rows(index, index < stop)


def _store(out_ref: Any, tile: Array, rows: _Rows, at: tuple[Any, Any], block_n: int) -> None:
    """Writes a tile `[block_n, block_m]` to its place in `[splits, M, N]`; `at`: tile of out-features, split."""
    features = at[0] * block_n + lax.iota(jnp.int32, block_n)
    mask = rows.mask[None, :] & (features < out_ref.shape[2])[:, None]
    plt.store(out_ref.at[at[1], rows.place[None, :], features[:, None]], tile, mask=mask)


def _tile(
    x_ref: Any,
    stack: PlanarStack,
    sums_ref: Any,
    index: Any,
    rows: _Rows,
    at: tuple[Any, Any],
    kind: PlanarFormat,
    tiles: MatmulTiles,
    blocks: int,
    assembly: bool,
) -> Float32[Array, "block_n block_m"]:
    """The part of a tile that one program sums: `blocks` blocks of words from where its split begins."""
    N, P = stack.words.shape[1], kind.plane
    planes, first = 16 // kind.bits, at[1] * blocks
    features = at[0] * tiles.block_n + lax.iota(jnp.int32, tiles.block_n)
    inside = features < N
    column = lax.iota(jnp.int32, P)
    scaled_weights = tiles.block_m >= SCALED_WEIGHTS

    def factors(values: Any, supers: Any, group: Any) -> Float32[Array, " block_n"]:
        found = _load(values, (index, group, features), inside).astype(jnp.float32)
        if supers is None:
            return found
        return found * _load(supers, (index, group // (values.shape[1] // supers.shape[1]), features), inside)

    def block(b: Any, total: Array) -> Array:
        words = _load(stack.words, (index, features[:, None], (b * P + column)[None, :]), inside[:, None])
        numbers = unpack(words, bits=kind.bits, zero=kind.zero, table=kind.table, assembly=assembly)
        part = scale = low = None
        for i, number in enumerate(numbers):
            group = (b * kind.block + i * P) // kind.group
            if scale is None:
                scale = factors(stack.scales, stack.scale_supers, group)
                low = None if stack.mins is None else factors(stack.mins, stack.min_supers, group)
            x = _load(
                x_ref, (rows.place[:, None], (b * kind.block + i * P + column)[None, :]), rows.mask[:, None]
            )  # [block_m, P]
            if scaled_weights:
                number = number * scale.astype(jnp.bfloat16)[:, None]
                if low is not None:
                    number = number - low.astype(jnp.bfloat16)[:, None]
                total = total + plt.dot(number, x.T)
            else:
                product = plt.dot(number, x.T)
                part = product if part is None else part + product
            if (i + 1) * P % kind.group == 0 or i == planes - 1:  # a group, or this block's share of one, is complete
                if part is not None:
                    total = total + part * scale[:, None]
                    if low is not None:
                        span = b if kind.group >= kind.block else group
                        total = total - low[:, None] * _load(sums_ref, (span, rows.place), rows.mask)[None, :]
                part = scale = None
        return total

    last = jnp.minimum(first + blocks, x_ref.shape[1] // kind.block)
    return lax.fori_loop(first, last, block, jnp.zeros((tiles.block_n, tiles.block_m), jnp.float32))


def _load(ref: Any, index: tuple[Any, ...], mask: Array) -> Array:
    """Elements where the mask holds, zeros elsewhere."""
    return plt.load(ref.at[index], mask=mask, other=np.zeros((), ref.dtype)[()])
