"""Products with weights in the planar layout, as a Pallas kernel for NVIDIA GPUs: W4, W8 and W2, affine or by a table.

The reference is `quantized_matmul.matmul_planar`, which also says what the layout is. What is particular here:

- Few rows: what a group multiplies is summed apart, exactly, and scaled in float32. Matrix units take 16 columns: where
  rows are fewer, each gets several, with zeros outside of another group, so that one product sums a block's groups
  apart and no thread scales what another one scales too.
- Many rows: it is cheaper to scale the weight, in bfloat16, which rounds scale, min and their result. The planes of a
  block are multiplied at once; pairs of their numbers lie as the planes hold them, and activations follow that order.
- Mins of few rows are subtracted as `min · Σx` of a group, with the sums of activations made once for all out-features.
- Scales and mins are read one block ahead: what is narrower than four bytes the compiler does not keep under way.
- A weight is a stack of many and an index into it is an operand, so that a program reads what it needs in place: layers
  and experts are never copied out.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from pallas_kernels.tuning import SCALED_WEIGHTS, TOGETHER, MatmulTiles
from pallas_kernels.unpacking import unpack

FEWEST_COLUMNS = 16  # of a product of the matrix units
DEQUANTIZED_ROWS = 32  # out-features of a program that dequantizes
SMALL_GROUP = 32  # inputs, up to which groups get columns of their own


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
    def groups(self) -> int:
        """Of a block; 1 where a group is larger."""
        return max(1, self.block // self.group)

    @property
    def together(self) -> int:
        """Planes that are multiplied at once where weights are scaled."""
        return max(1, min(16 // self.bits, TOGETHER // self.plane))

    @property
    def is_aligned(self) -> bool:
        """Whether groups are whole blocks, or blocks whole groups: what the kernels want."""
        return self.group % self.plane == 0 and (self.block % self.group == 0 or self.group % self.block == 0)


class _Work(NamedTuple):
    """What one program does: a tile of out-features × rows, over some blocks of words."""

    index: Any  # of the weight in the stack
    feature: Int32[Array, " block_n"]
    is_feature: Array  # bool [block_n]
    row: Any  # the first
    last_row: Any  # behind the last
    block: Any  # the first
    last_block: Any  # behind the last


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
        at = pl.program_id(0) * tiles.block_m, pl.program_id(1), pl.program_id(2)
        work = _work(at, index_ref[0], M, stack_refs, x_ref.shape[1], kind, tiles, blocks)
        _store(out_ref, _tile(x_ref, stack_refs, sums_ref, work, kind, tiles, not interpret), work, at[2])

    parts = pl.pallas_call(
        kernel,
        grid=(-(-M // tiles.block_m), -(-N // tiles.block_n), splits),
        out_shape=jax.ShapeDtypeStruct((splits, M, N), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=f"planar_matmul_{kind.bits}",
    )(index.reshape(1), x, *_present(stack), *([] if sums is None else [sums]))
    return parts[0] if splits == 1 else jnp.sum(parts, axis=0)


def planar_dequantized(
    stack: PlanarStack, index: Int32[Array, ""], kind: PlanarFormat, K: int, *, interpret: bool = False
) -> BFloat16[Array, "N K"]:
    """W = stack[index] in bfloat16, in memory: where so many rows multiply it that a dense product is faster.

    Args:
        stack: weights.
        index: which.
        kind: their format; must be aligned.
        K: inputs.
        interpret: run the kernel's steps as plain JAX, on any device.
    """
    assert kind.is_aligned, kind
    N, P = stack.words.shape[1], kind.plane

    def kernel(*refs: Any) -> None:
        index_ref, out_ref, stack_refs = refs[0], refs[-1], _present_refs(refs[1:-1], stack)
        b = pl.program_id(1)
        feature = pl.program_id(0) * DEQUANTIZED_ROWS + lax.iota(jnp.int32, DEQUANTIZED_ROWS)
        is_feature, column = feature < N, lax.iota(jnp.int32, P)
        place = index_ref[0], feature[:, None], (b * P + column)[None, :]
        words = _load(stack_refs.words, place, is_feature[:, None])
        numbers = unpack(words, bits=kind.bits, zero=kind.zero, table=kind.table, assembly=not interpret)
        for i, number in enumerate(numbers):
            group = lax.div(b * kind.block + i * P, kind.group)
            scale, low = _factors(_stored(stack_refs, (index_ref[0], group, feature), is_feature), stack_refs)
            weight = number.astype(jnp.float32) * scale[:, None]
            weight = weight if low is None else weight - low[:, None]
            to = feature[:, None], (b * kind.block + i * P + column)[None, :]
            plt.store(out_ref.at[to], weight.astype(jnp.bfloat16), mask=is_feature[:, None])

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(N, DEQUANTIZED_ROWS), K // kind.block),
        out_shape=jax.ShapeDtypeStruct((N, K), jnp.bfloat16),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=f"planar_dequantized_{kind.bits}",
    )(index.reshape(1), *_present(stack))


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
            place = (start, *at)
            work = _work(place, index_ref[block], stop_ref[block], stack_refs, x_ref.shape[1], kind, tiles, turns)
            _store(out_ref, _tile(x_ref, stack_refs, sums_ref, work, kind, tiles, not interpret), work, at[1])

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
    if tiles.block_m >= SCALED_WEIGHTS:
        M, K = x.shape
        return x.reshape(M, -1, kind.together, kind.plane // 2, 2).swapaxes(2, 3).reshape(M, K), None
    if stack.mins is None:
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
    sums_ref = rest.pop() if sums is not None else None
    return index_ref, x_ref, out_ref, _present_refs(rest, stack), sums_ref


def _present_refs(refs: Sequence[Any], stack: PlanarStack) -> PlanarStack:
    """Refs of a stack's arrays, None where it has none."""
    rest = iter(refs)
    return PlanarStack(*(None if part is None else next(rest) for part in stack))


def _work(
    at: tuple[Any, Any, Any],
    index: Any,
    last_row: Any,
    stack: PlanarStack,
    K: int,
    kind: PlanarFormat,
    tiles: MatmulTiles,
    blocks: int,
) -> _Work:
    """`at`: first row, tile of out-features, split."""
    row, tile, split = at
    feature = tile * tiles.block_n + lax.iota(jnp.int32, tiles.block_n)
    return _Work(
        index=index,
        feature=feature,
        is_feature=feature < stack.words.shape[1],
        row=row,
        last_row=jnp.minimum(row + tiles.block_m, last_row),
        block=split * blocks,
        last_block=jnp.minimum((split + 1) * blocks, K // kind.block),
    )


def _store(out_ref: Any, tile: Float32[Array, "rows block_n"], work: _Work, split: Any) -> None:
    """Writes a tile to its place in `[splits, M, N]`."""
    row = work.row + lax.iota(jnp.int32, tile.shape[0])
    mask = (row < work.last_row)[:, None] & work.is_feature[None, :]
    plt.store(out_ref.at[split, row[:, None], work.feature[None, :]], tile, mask=mask)


def _tile(
    x_ref: Any, stack: PlanarStack, sums_ref: Any, work: _Work, kind: PlanarFormat, tiles: MatmulTiles, assembly: bool
) -> Float32[Array, "rows block_n"]:
    """The part of a tile that one program sums; it may have more rows than `tiles` says, which are not to be stored."""

    def numbers(b: Any) -> list[Array]:
        place = b * kind.plane + lax.iota(jnp.int32, kind.plane)
        words = _load(stack.words, (work.index, work.feature[:, None], place[None, :]), work.is_feature[:, None])
        return unpack(words, bits=kind.bits, zero=kind.zero, table=kind.table, assembly=assembly)

    if tiles.block_m >= SCALED_WEIGHTS:
        return _many_rows(x_ref, stack, work, kind, tiles.block_m, numbers)
    return _few_rows(x_ref, stack, sums_ref, work, kind, tiles.block_m, numbers)


def _few_rows(
    x_ref: Any,
    stack: PlanarStack,
    sums_ref: Any,
    work: _Work,
    kind: PlanarFormat,
    rows: int,
    numbers: Callable[[Any], list[Array]],
) -> Float32[Array, "rows block_n"]:
    """Sums of groups apart, then scaled. Column r·side + g is row r inside group g of `side`, and zero elsewhere."""
    P, groups, side = kind.plane, kind.groups, _side_by_side(kind, rows)
    columns = max(FEWEST_COLUMNS, rows * side)
    column = lax.iota(jnp.int32, columns)
    own, row = lax.rem(column, side), work.row + lax.div(column, side)
    is_row = row < work.last_row

    def stored(b: Any) -> list[list[Array]]:
        group = lax.div(b * kind.block, kind.group)
        if side == 1:
            return [_stored(stack, (work.index, group + i, work.feature), work.is_feature) for i in range(groups)]
        at = work.index, (group + own)[None, :], work.feature[:, None]
        return [_stored(stack, at, work.is_feature[:, None] & is_row[None, :])]

    def block(b: Any, carry: tuple[Array, list[list[Array]]]) -> tuple[Array, list[list[Array]]]:
        total, here = carry
        ahead = stored(jnp.minimum(b + 1, work.last_block - 1))
        planes = numbers(b)
        for part, factors in enumerate(here):  # of the block: a group, or all of them side by side
            products: list[Array] = []
            for i in range(part * len(planes) // len(here), (part + 1) * len(planes) // len(here)):
                inputs = b * kind.block + i * P + lax.iota(jnp.int32, P)
                mine = is_row if side == 1 else is_row & (own == i * P // kind.group)
                x = _load(x_ref, (row[:, None], inputs[None, :]), mine[:, None])  # [columns, P]
                products.append(plt.dot(planes[i], x.T))
            scale, low = _factors(factors, stack)
            if side == 1:
                scale, low = scale[:, None], None if low is None else low[:, None]
            total = total + functools.reduce(jnp.add, products) * scale
            if low is not None:
                sums = _load(sums_ref, (b * groups + part + own, row), is_row)
                total = total - low * sums[None, :]
        return total, ahead

    empty = jnp.zeros((work.feature.shape[0], columns), jnp.float32)
    total, _ = lax.fori_loop(work.block, work.last_block, block, (empty, stored(work.block)))
    return (total if side == 1 else jnp.sum(total.reshape(-1, columns // side, side), axis=2)).T


def _side_by_side(kind: PlanarFormat, rows: int) -> int:
    """All groups of a block, where there are columns for them and they are small: else scaling them is no matter."""
    return kind.groups if kind.group <= SMALL_GROUP and rows * kind.groups <= FEWEST_COLUMNS else 1


def _many_rows(
    x_ref: Any, stack: PlanarStack, work: _Work, kind: PlanarFormat, rows: int, numbers: Callable[[Any], list[Array]]
) -> Float32[Array, "rows block_n"]:
    """Weights scaled, then summed over all groups at once."""
    P, planes, width = kind.plane, 16 // kind.bits, kind.together * kind.plane
    row = work.row + lax.iota(jnp.int32, rows)
    begins = [i for i in range(planes) if i * P % min(kind.group, kind.block) == 0]  # planes that begin a group

    def stored(b: Any) -> list[list[Array]]:
        groups = [lax.div(b * kind.block + i * P, kind.group) for i in begins]
        return [_stored(stack, (work.index, group, work.feature), work.is_feature) for group in groups]

    def block(b: Any, carry: tuple[Array, list[list[Array]]]) -> tuple[Array, list[list[Array]]]:
        total, here = carry
        ahead = stored(jnp.minimum(b + 1, work.last_block - 1))
        weights: list[Array] = []
        for i, number in enumerate(numbers(b)):
            begun = max(begin for begin in begins if begin <= i)
            scale, low = _factors(here[begins.index(begun)], stack)
            weight = number * scale.astype(jnp.bfloat16)[:, None]
            weights.append(weight if low is None else weight - low.astype(jnp.bfloat16)[:, None])
        for i in range(0, planes, kind.together):
            inputs = b * kind.block + i * P + lax.iota(jnp.int32, width)
            x = _load(x_ref, (row[:, None], inputs[None, :]), (row < work.last_row)[:, None])
            total = total + plt.dot(x, _in_pairs(weights[i : i + kind.together]).T)
        return total, ahead

    empty = jnp.zeros((rows, work.feature.shape[0]), jnp.float32)
    return lax.fori_loop(work.block, work.last_block, block, (empty, stored(work.block)))[0]


def _in_pairs(planes: list[Array]) -> Array:
    """Planes `[block_n, P]` as `[block_n, P·planes]`, pair by pair: what a thread holds stays where it is."""
    n, P = planes[0].shape
    pairs = _stacked([plane.reshape(n, P // 2, 2) for plane in planes])
    return pairs.reshape(n, P // 2, 2, len(planes)).swapaxes(2, 3).reshape(n, -1)


def _stacked(parts: list[Array]) -> Array:
    """Along new last axes of two."""
    if len(parts) == 1:
        return parts[0]
    even, odd = _stacked(parts[::2]), _stacked(parts[1::2])
    return jnp.concatenate([even[..., None], odd[..., None]], axis=-1)


def _stored(stack: PlanarStack, at: tuple[Any, Any, Any], mask: Array) -> list[Array]:
    """Scales and mins as they lie in memory, each with what multiplies it; `at`: weight, group, out-features."""
    index, group, feature = at
    found: list[Array] = []
    for values, supers in ((stack.scales, stack.scale_supers), (stack.mins, stack.min_supers)):
        if values is None:
            continue
        found.append(_load(values, at, mask))
        if supers is not None:
            above = lax.div(group, jnp.int32(values.shape[1] // supers.shape[1]))
            found.append(_load(supers, (index, above, feature), mask))
    return found


def _factors(stored: list[Array], stack: PlanarStack) -> tuple[Array, Array | None]:
    """Scales and mins in float32."""
    rest = list(stored)

    def number(supers: Any) -> Array:
        found = rest.pop(0).astype(jnp.float32)
        return found if supers is None else found * rest.pop(0)

    scale = number(stack.scale_supers)
    return scale, None if stack.mins is None else number(stack.min_supers)


def _load(ref: Any, index: tuple[Any, ...], mask: Array) -> Array:
    """Elements where the mask holds, zeros elsewhere."""
    return plt.load(ref.at[index], mask=mask, other=np.zeros((), ref.dtype)[()])
