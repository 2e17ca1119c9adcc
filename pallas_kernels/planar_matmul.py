"""Products with weights in the planar layout, as a Pallas kernel for NVIDIA GPUs: W4, W8 and W2, affine or by a table.

The reference is `quantized_matmul.matmul_planar`, which also says what the layout is. What is particular here:

- Few rows: activations are whole numbers of two bytes with a unit for each span, a group or the block of words in a
  larger one, and weights are bytes. Matrix units sum a span's products exactly, high and low bytes in columns of their
  own, and what is scaled in float32 is a sum. They take 16 columns: where rows are fewer, each gets several, with zeros
  outside of another span, so that one product sums spans apart and no thread scales what another one scales too.
- Many rows: it is cheaper to scale the weight, in bfloat16, which rounds scale, min and their result. The planes of a
  block are multiplied at once; pairs of their numbers lie as the planes hold them, and activations follow that order.
- Mins of few rows, and zeros, are subtracted as `min · Σx` of a span, whose sums are made once for all out-features.
- Scales and mins are read one turn ahead: what is narrower than four bytes the compiler does not keep under way.
- A weight is a stack of many and an index into it is an operand, so that a program reads what it needs in place: layers
  and experts are never copied out.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels.activations import HIGH, InPairs, InSpans, SpanBytes
from pallas_kernels.planar_weights import PlanarFormat, PlanarStack, factors_of, load, named, present, stored_factors
from pallas_kernels.tuning import SCALED_WEIGHTS, MatmulTiles
from pallas_kernels.unpacking import unpack, unpack_bytes

FEWEST_COLUMNS = 16  # of a product of the matrix units


class _Pairs(NamedTuple):
    """Activations of many rows."""

    x: BFloat16[Array, "M K"]


class _Work(NamedTuple):
    """What one program does: a tile of out-features × rows, over some blocks of words."""

    index: Any  # of the weight in the stack
    feature: Int32[Array, " block_n"]
    is_feature: Array  # bool [block_n]
    row: Any  # the first
    last_row: Any  # behind the last
    block: Any  # the first
    last_block: Any  # behind the last


def form_of(kind: PlanarFormat, tiles: MatmulTiles) -> InSpans | InPairs:
    """How a product of this format and these tiles takes its activations."""
    assert kind.is_aligned, kind
    few = tiles.block_m < SCALED_WEIGHTS
    return InSpans(kind.span) if few else InPairs(kind.plane, kind.together)


def planar_matmul(
    x: SpanBytes | BFloat16[Array, "M K"],
    stack: PlanarStack,
    index: Int32[Array, ""],
    kind: PlanarFormat,
    tiles: MatmulTiles,
    *,
    interpret: bool = False,
) -> Float32[Array, "splits M N"]:
    """x · Wᵀ for W = stack[index], as parts to be added up; sums are float32.

    Args:
        x: activations, as `form_of` says.
        stack: weights.
        index: which.
        kind: their format; must be aligned.
        tiles: how the product is cut.
        interpret: run the kernel's steps as plain JAX, on any device.
    """
    inputs, (M, K), N = *_inputs(x), stack.words.shape[1]
    splits, blocks = _splits(K, kind, tiles)

    def kernel(*refs: Any) -> None:
        index_ref, out_ref, (inputs_refs, stack_refs) = refs[0], refs[-1], named(refs[1:-1], inputs, stack)
        at = pl.program_id(0) * tiles.block_m, pl.program_id(1), pl.program_id(2)
        work = _work(at, index_ref[0], M, stack_refs, K, kind, tiles, blocks)
        _store(out_ref, _tile(inputs_refs, stack_refs, work, kind, tiles, not interpret), work, at[2])

    return pl.pallas_call(
        kernel,
        grid=(-(-M // tiles.block_m), -(-N // tiles.block_n), splits),
        out_shape=jax.ShapeDtypeStruct((splits, M, N), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=f"planar_matmul_{kind.bits}",
    )(index.reshape(1), *present(inputs), *present(stack))


def planar_grouped_matmul(
    x: SpanBytes | BFloat16[Array, "padded K"],
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
) -> Float32[Array, "splits padded N"]:
    """Rows `start` to `stop` of each block times its own weight `stack[index]`, for the first `used` blocks, as parts
    to be added up.

    `most` is how many rows a block has at most. Rows of no block may hold anything.
    """
    pieces = -(-most // tiles.block_m)
    inputs, (rows, K), N = *_inputs(x), stack.words.shape[1]
    splits, turns = _splits(K, kind, tiles)

    def kernel(used_ref: Any, start_ref: Any, stop_ref: Any, *refs: Any) -> None:
        index_ref, out_ref, (inputs_refs, stack_refs) = refs[0], refs[-1], named(refs[1:-1], inputs, stack)
        piece, at = pl.program_id(0), (pl.program_id(1), pl.program_id(2))  # not inside of a condition: JAX refuses it
        block = lax.div(piece, pieces)
        start = start_ref[block] + lax.rem(piece, pieces) * tiles.block_m

        @pl.when((block < used_ref[0]) & (start < stop_ref[block]))
        def _() -> None:
            place = (start, *at)
            work = _work(place, index_ref[block], stop_ref[block], stack_refs, K, kind, tiles, turns)
            _store(out_ref, _tile(inputs_refs, stack_refs, work, kind, tiles, not interpret), work, at[1])

    return pl.pallas_call(
        kernel,
        grid=(index.shape[0] * pieces, -(-N // tiles.block_n), splits),
        out_shape=jax.ShapeDtypeStruct((splits, rows, N), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=f"planar_grouped_matmul_{kind.bits}",
    )(used.reshape(1), start, stop, index, *present(inputs), *present(stack))


def _inputs(x: SpanBytes | BFloat16[Array, "M K"]) -> tuple[SpanBytes | _Pairs, tuple[int, int]]:
    """Activations as kernels name them, and M and K."""
    inputs = x if isinstance(x, SpanBytes) else _Pairs(x)
    M, K = inputs[0].shape[-2:]
    return inputs, (M, K)


def _splits(K: int, kind: PlanarFormat, tiles: MatmulTiles) -> tuple[int, int]:
    """Parts that K is cut into, and blocks of words of each, whole turns; the last may have fewer."""
    whole, turn = K // kind.block, blocks_of_turn(kind, tiles)
    blocks = -(-whole // (tiles.splits * turn)) * turn
    return -(-whole // blocks), blocks


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
    inputs: Any, stack: PlanarStack, work: _Work, kind: PlanarFormat, tiles: MatmulTiles, assembly: bool
) -> Float32[Array, "rows block_n"]:
    """The part of a tile that one program sums; it may have more rows than `tiles` says, which are not to be stored."""

    def words(b: Any) -> Array:
        place = b * kind.plane + lax.iota(jnp.int32, kind.plane)
        mask = work.is_feature[:, None]
        if stack.words.shape[2] % (blocks_of_turn(kind, tiles) * kind.plane):  # the last turn has fewer
            mask = mask & (place < stack.words.shape[2])[None, :]
        return load(stack.words, (work.index, work.feature[:, None], place[None, :]), mask)

    what: Any = {"bits": kind.bits, "table": kind.table, "assembly": assembly}
    if tiles.block_m >= SCALED_WEIGHTS:
        numbers = partial(unpack, zero=kind.zero, **what)
        return _many_rows(inputs.x, stack, work, kind, tiles.block_m, lambda b: numbers(words(b)))
    return _few_rows(inputs, stack, work, kind, tiles, lambda b: unpack_bytes(words(b), **what))


def _few_rows(
    inputs: Any,
    stack: PlanarStack,
    work: _Work,
    kind: PlanarFormat,
    tiles: MatmulTiles,
    numbers: Callable[[Any], list[Array]],
) -> Float32[Array, "rows block_n"]:
    """Sums of spans apart, then scaled. Columns 2c and 2c + 1 are the high and low bytes of row c // side inside span
    c % side, and zero elsewhere.
    """
    P, spans, side, turn = kind.plane, kind.spans, _side_by_side(kind, tiles), blocks_of_turn(kind, tiles)
    columns = max(FEWEST_COLUMNS, 2 * tiles.block_m * side)
    column, scaled = lax.iota(jnp.int32, columns), lax.iota(jnp.int32, columns // 2)
    byte, own, row = lax.rem(column, 2), lax.rem(lax.div(column, 2), side), work.row + lax.div(column, 2 * side)
    is_row = row < work.last_row
    span_of, row_of = lax.rem(scaled, side), work.row + lax.div(scaled, side)
    is_row_of = row_of < work.last_row
    begin, end = lax.div(work.block, turn), pl.cdiv(work.last_block, turn)
    K, last_span = inputs.codes.shape[2], inputs.unit.shape[0]
    is_ragged, raised = K // kind.block % turn > 0, _raised(kind)
    subtracts = stack.mins is not None or raised != 0

    def stored(t: Any) -> list[list[Array]]:
        """Factors of the spans of a turn, as they lie in memory."""
        found: list[list[Array]] = []
        for part in range(0, turn * spans, side):
            first = t * turn * spans + part
            span = first + span_of
            exists = is_row_of & (span < last_span) if is_ragged else is_row_of
            factors = [load(inputs.unit, (span, row_of), exists)]
            factors += [load(inputs.total, (span, row_of), exists)] if subtracts else []
            if side == 1:  # the same for all rows
                group = lax.div(first * kind.span, kind.group)
                factors += stored_factors(stack, (work.index, group, work.feature), work.is_feature)
            else:
                group, mask = lax.div(span * kind.span, kind.group), work.is_feature[:, None] & exists[None, :]
                factors += stored_factors(stack, (work.index, group[None, :], work.feature[:, None]), mask)
            found.append(factors)
        return found

    def step(t: Any, carry: tuple[Array, list[list[Array]]]) -> tuple[Array, list[list[Array]]]:
        total, here = carry
        ahead = stored(jnp.minimum(t + 1, end - 1))
        planes = [plane for i in range(turn) for plane in numbers(t * turn + i)]
        each = len(planes) // len(here)
        for part, factors in enumerate(here):  # some spans side by side, or one
            sums = jnp.zeros((total.shape[0], columns), jnp.int32)
            for i in range(part * each, (part + 1) * each):
                at = t * turn * kind.block + i * P + lax.iota(jnp.int32, P)
                mine = is_row if side == 1 else is_row & (own == i * P // kind.span % side)
                mask = mine[:, None] & (at < K)[None, :] if is_ragged else mine[:, None]
                x = load(inputs.codes, (byte[:, None], row[:, None], at[None, :]), mask)  # [columns, P]
                sums = sums + lax.dot_general(planes[i], x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
            counts = jnp.where(lax.iota(jnp.int32, 2) == 0, HIGH, 1)
            whole = jnp.sum(sums.reshape(-1, columns // 2, 2) * counts[None, None, :], axis=2)
            unit, *rest = factors
            of_x = rest.pop(0) if subtracts else None
            scale, low = factors_of(rest, stack)
            if side == 1:
                scale, low = scale[:, None], None if low is None else low[:, None]
            total = total + whole.astype(jnp.float32) * (scale * unit[None, :])
            if raised:
                low = scale * raised if low is None else scale * raised + low
            if low is not None and of_x is not None:
                total = total - low * of_x[None, :]
        return total, ahead

    empty = jnp.zeros((work.feature.shape[0], columns // 2), jnp.float32)
    total, _ = lax.fori_loop(begin, end, step, (empty, stored(begin)))
    return (total if side == 1 else jnp.sum(total.reshape(-1, columns // 2 // side, side), axis=2)).T


def _side_by_side(kind: PlanarFormat, tiles: MatmulTiles) -> int:
    """Spans that are summed in columns of their own: as many as there are columns for, of one turn."""
    return max(1, min(FEWEST_COLUMNS // (2 * tiles.block_m), blocks_of_turn(kind, tiles) * kind.spans))


def blocks_of_turn(kind: PlanarFormat, tiles: MatmulTiles) -> int:
    """Blocks of words that one turn of the loop takes."""
    return max(1, tiles.turn // kind.block) if tiles.block_m < SCALED_WEIGHTS else 1


def _raised(kind: PlanarFormat) -> int:
    """How much too high numbers of few rows are: it is cheaper to subtract it of a span's sum."""
    return 0 if kind.table is not None else kind.zero - (128 if kind.bits == 8 else 0)


def _many_rows(
    x_ref: Any, stack: PlanarStack, work: _Work, kind: PlanarFormat, rows: int, numbers: Callable[[Any], list[Array]]
) -> Float32[Array, "rows block_n"]:
    """Weights scaled, then summed over all groups at once."""
    P, planes, width = kind.plane, 16 // kind.bits, kind.together * kind.plane
    row = work.row + lax.iota(jnp.int32, rows)
    begins = [i for i in range(planes) if i * P % kind.span == 0]  # planes that begin a group

    def stored(b: Any) -> list[list[Array]]:
        groups = [lax.div(b * kind.block + i * P, kind.group) for i in begins]
        return [stored_factors(stack, (work.index, group, work.feature), work.is_feature) for group in groups]

    def block(b: Any, carry: tuple[Array, list[list[Array]]]) -> tuple[Array, list[list[Array]]]:
        total, here = carry
        ahead = stored(jnp.minimum(b + 1, work.last_block - 1))
        weights: list[Array] = []
        for i, number in enumerate(numbers(b)):
            begun = max(begin for begin in begins if begin <= i)
            scale, low = factors_of(here[begins.index(begun)], stack)
            weight = number * scale.astype(jnp.bfloat16)[:, None]
            weights.append(weight if low is None else weight - low.astype(jnp.bfloat16)[:, None])
        for i in range(0, planes, kind.together):
            inputs = b * kind.block + i * P + lax.iota(jnp.int32, width)
            x = load(x_ref, (row[:, None], inputs[None, :]), (row < work.last_row)[:, None])
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
