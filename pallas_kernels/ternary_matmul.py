"""Ternary weights × activations of eight bits (BitNet b1.58), as a Pallas kernel for NVIDIA GPUs and as plain XLA.

Sums are exact integers. Codes are 0, 1, 2 for −1, 0, 1: the matrix units multiply the codes as they are, and Σx is
subtracted once, so that unpacking is a shift and one logic operation for four weights.

A word of the planar layout is read as two bytes, whose four fields are elements of planes i and 4 + i. So bytes 2j and
2j + 1 of a block, shifted by 2i, are elements i·P + j and (4 + i)·P + j, and activations are put in that order once.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int8, Int32, UInt8, UInt16

from pallas_kernels.activations import FIELDS, FieldTokens
from pallas_kernels.planar_weights import PlanarFormat
from pallas_kernels.quantized_matmul import quantize_tokens, unpack_planar
from pallas_kernels.tuning import MatmulTiles


def is_ternary(kind: PlanarFormat, K: int) -> bool:
    """Whether products of a weight of K inputs with int8 activations are this kernel's: two bits, one scale a row.

    With more scales a row, `planar_matmul` of the activations' codes is as exact: a group's sum fits a float32.
    """
    return kind.bits == 2 and kind.table is None and kind.group == K


def ternary_matmul(
    tokens: FieldTokens,
    words: UInt16[Array, "S N W"],
    scales: Float[Array, "S 1 N"],
    index: Int32[Array, ""],
    kind: PlanarFormat,
    tiles: MatmulTiles,
    *,
    interpret: bool = False,
) -> Float32[Array, "M N"]:
    """x · Wᵀ for W = stack[index]: integer sums, then the scale of each output.

    Args:
        tokens: activations, `InFields` of the format's plane.
        words: codes of a stack of weights, two bits each.
        scales: one for each out-feature.
        index: which weight.
        kind: the format; `is_ternary`.
        tiles: how the product is cut.
        interpret: run the kernel's steps as plain JAX, on any device.
    """
    M, K = tokens.codes.shape
    assert is_ternary(kind, K), kind
    N, P = words.shape[1], kind.plane
    stack = lax.bitcast_convert_type(words, jnp.uint8).reshape(*words.shape[:2], -1)  # [S, N, K/4]
    whole = K // kind.block
    blocks = -(-whole // tiles.splits)
    splits = -(-whole // blocks)
    total, factor = tokens.total[:, None], tokens.factor[:, None]

    def kernel(
        index_ref: Any, x_ref: Any, words_ref: Any, scales_ref: Any, total_ref: Any, factor_ref: Any, out_ref: Any
    ) -> None:
        part = pl.program_id(2)
        first, last = part * blocks, jnp.minimum((part + 1) * blocks, whole)
        rows = pl.program_id(0) * tiles.block_m + lax.iota(jnp.int32, tiles.block_m)
        features = pl.program_id(1) * tiles.block_n + lax.iota(jnp.int32, tiles.block_n)
        is_row, is_feature = rows < M, features < N
        sums = _tile(x_ref, words_ref, index_ref[0], rows, features, first, last, M, 2 * P, not interpret)
        if splits == 1:  # else the parts are added up first
            scale = plt.load(scales_ref.at[index_ref[0], 0, features], mask=is_feature, other=0.0)
            sum_of_row = plt.load(total_ref.at[rows, 0], mask=is_row, other=0)
            factor_of_row = plt.load(factor_ref.at[rows, 0], mask=is_row, other=0.0)
            sums = _scaled(sums, sum_of_row[None], factor_of_row[None], scale[:, None], kind.zero)
        plt.store(out_ref.at[part, rows[None, :], features[:, None]], sums, mask=is_row[None, :] & is_feature[:, None])

    parts = pl.pallas_call(
        kernel,
        grid=(-(-M // tiles.block_m), -(-N // tiles.block_n), splits),
        out_shape=jax.ShapeDtypeStruct((splits, M, N), jnp.float32 if splits == 1 else jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="ternary_matmul",
    )(index.reshape(1), tokens.codes, stack, scales, total, factor)
    if splits == 1:
        return parts[0]
    scale = lax.dynamic_index_in_dim(scales, index, keepdims=False)
    return _scaled(jnp.sum(parts, axis=0), total, factor, scale, kind.zero)


def ternary_matmul_xla(
    x: Float[Array, "M K"],
    words: UInt16[Array, "N W"],
    scales: Float[Array, "1 N"],
    kind: PlanarFormat,
) -> Float32[Array, "M N"]:
    """The same product in plain XLA; equal to the kernel's bit for bit."""
    tokens, factor = quantize_tokens(x)
    codes = unpack_planar(words, 2, kind.plane).astype(jnp.int8)  # [N, K]
    sums = lax.dot_general(tokens, codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return _scaled(sums, jnp.sum(tokens, axis=-1, keepdims=True, dtype=jnp.int32), factor, scales, kind.zero)


def _scaled(
    sums: Int32[Array, "*tile"],
    total: Int32[Array, "*#tile"],
    factor: Float32[Array, "*#tile"],
    scales: Float[Array, "*#tile"],
    zero: int,
) -> Float32[Array, "*tile"]:
    """(Σ code·x − zero · Σ x) · scale · factor of the row."""
    return (sums - zero * total).astype(jnp.float32) * scales.astype(jnp.float32) * factor


def _tile(
    x_ref: Any,
    words_ref: Any,
    index: Any,
    rows: Array,
    features: Array,
    first: Any,
    last: Any,
    M: int,
    width: int,
    assembly: bool,
) -> Int32[Array, "block_n block_m"]:
    """Sums over blocks `first` to `last` of `width` bytes."""
    inside, row_mask = (features < words_ref.shape[1])[:, None], (rows < M)[:, None]
    column = lax.iota(jnp.int32, width)

    def block(b: Any, total: Array) -> Array:
        at = (index, features[:, None], (b * width + column)[None, :])
        packed = plt.load(words_ref.at[at], mask=inside, other=np.uint8(0))
        for field in range(FIELDS):
            place = b * FIELDS * width + field * width
            x = plt.load(x_ref.at[rows[:, None], (place + column)[None, :]], mask=row_mask, other=np.int8(0))
            codes = _field_assembly(packed, field) if assembly else _field(packed, field)
            total = total + lax.dot_general(codes, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return total

    return lax.fori_loop(first, last, block, jnp.zeros((features.shape[0], rows.shape[0]), jnp.int32))


def _field(packed: UInt8[Array, "rows width"], field: int) -> Int8[Array, "rows width"]:
    return ((packed >> np.uint8(2 * field)) & np.uint8(3)).astype(jnp.int8)


def _field_assembly(packed: UInt8[Array, "rows width"], field: int) -> Int8[Array, "rows width"]:
    """Four bytes of a register at once: bits that a shift brings in from a neighbour are masked away."""
    text = "and.b32 $0, $1, 0x03030303;"
    if field:
        text = f"{{ .reg .b32 t; shr.u32 t, $1, {2 * field}; and.b32 $0, t, 0x03030303; }}"
    shape = jax.ShapeDtypeStruct(packed.shape, jnp.int8)
    [codes] = plt.elementwise_inline_asm(text, args=[packed], constraints="=r,r", pack=4, result_shape_dtypes=[shape])
    return codes
