"""Activations as whole numbers, the way that kernels of packed weights read them, each in one launch: XLA takes three
or four, of which one ends before the next begins.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int8, Int32

FIELDS = 4  # ternary codes of a byte
HIGH = 256  # what a high byte counts
_DIGITS = 14  # binary, of a number in two bytes, besides its sign
_SMALLEST_EXPONENT = 30  # of the largest of a span, biased: what is smaller counts as so large
_INPUTS_OF_A_WARP = 2048
_INPUTS_OF_SPANS = 2048  # that one program rounds


class FieldTokens(NamedTuple):
    """Tokens as `quantize_tokens` rounds them, in the order of a byte's fields."""

    codes: Int8[Array, "M K"]
    factor: Float32[Array, " M"]  # that undoes the rounding; NaN: the token holds what is no finite number
    total: Int32[Array, " M"]  # sum of the codes


def field_tokens(x: Float[Array, "M K"], plane: int, *, interpret: bool = False) -> FieldTokens:
    """`quantized_matmul.quantize_tokens`, and more: see `FieldTokens`.

    Args:
        x: activations.
        plane: of the weights' words.
        interpret: run the kernel's steps as plain JAX, on any device.
    """
    M, K = x.shape
    width = pl.next_power_of_2(K)

    def kernel(x_ref: Any, codes_ref: Any, factor_ref: Any, total_ref: Any) -> None:
        row, place = pl.program_id(0), lax.iota(jnp.int32, width)
        inside = place < K
        inputs = plt.load(x_ref.at[row, _input_of(place, plane)], mask=inside, other=jnp.zeros((), x.dtype)[()])
        inputs = inputs.astype(jnp.float32)
        sizes = jnp.abs(inputs)
        largest = jnp.max(jnp.where(sizes < jnp.inf, sizes, jnp.inf), axis=0)[None]  # a maximum may leave NaN out
        scale = _quotient(127, jnp.maximum(largest, 1e-5), not interpret)
        scaled = inputs * scale
        codes = jnp.where(jnp.abs(scaled) < jnp.inf, _nearest(scaled, not interpret), 0)
        codes = jnp.clip(codes, -128, 127)
        plt.store(codes_ref.at[row, place], codes.astype(jnp.int8), mask=inside)
        factor = jnp.where(largest < jnp.inf, _quotient(1, scale, not interpret), jnp.nan)
        plt.store(factor_ref.at[row + lax.iota(jnp.int32, 1)], factor)
        plt.store(total_ref.at[row], jnp.sum(codes, axis=0))

    shapes = (M, K), jnp.int8, (M,), jnp.float32, (M,), jnp.int32
    found = pl.pallas_call(
        kernel,
        grid=(M,),
        out_shape=[jax.ShapeDtypeStruct(shapes[i], shapes[i + 1]) for i in (0, 2, 4)],
        compiler_params=plt.CompilerParams(num_warps=min(16, max(1, width // _INPUTS_OF_A_WARP)), num_stages=1),
        interpret=interpret,
        name="ternary_tokens",
    )(x)
    return FieldTokens(*found)


class SpanBytes(NamedTuple):
    """Tokens in 15 bits with one unit for each span of inputs: x = (256 · high + low) · unit."""

    codes: Int8[Array, "2 M K"]  # high bytes, then low ones
    unit: Float32[Array, "spans M"]  # a power of two; NaN: the span holds what is no finite number
    total: Float32[Array, "spans M"]  # sum of the span


def span_bytes(x: Float[Array, "M K"], span: int, *, interpret: bool = False) -> SpanBytes:
    """Rounds each input by at most 2^-15 of what its span's largest is below. Whole numbers up to 2^13 stay exact.

    Args:
        x: activations.
        span: inputs that share a unit, a power of two.
        interpret: run the kernel's steps as plain JAX, on any device.
    """
    M, K = x.shape
    spans, at_once = K // span, max(1, _INPUTS_OF_SPANS // span)

    def kernel(x_ref: Any, codes_ref: Any, unit_ref: Any, total_ref: Any) -> None:
        row, at = pl.program_id(0), pl.program_id(1) * at_once + lax.iota(jnp.int32, at_once)
        is_span = at < spans
        place, inside = at[:, None] * span + lax.iota(jnp.int32, span)[None, :], is_span[:, None]
        inputs = plt.load(x_ref.at[row, place], mask=inside, other=jnp.zeros((), x.dtype)[()]).astype(jnp.float32)
        sizes = jnp.abs(inputs)
        largest = jnp.max(jnp.where(sizes < jnp.inf, sizes, jnp.inf), axis=1)  # a maximum may leave NaN out
        exponent = lax.bitcast_convert_type(largest, jnp.int32) >> 23  # biased by 127
        exponent = jnp.maximum(exponent, _SMALLEST_EXPONENT) - (_DIGITS - 1)
        unit, inverse = (lax.bitcast_convert_type(power << 23, jnp.float32) for power in (exponent, 254 - exponent))
        scaled = jnp.where(sizes < jnp.inf, inputs * inverse[:, None], 0.0)
        whole = _nearest(scaled, not interpret)
        low = ((whole + HIGH // 2) & (HIGH - 1)) - HIGH // 2
        plt.store(codes_ref.at[0, row, place], ((whole - low) >> 8).astype(jnp.int8), mask=inside)
        plt.store(codes_ref.at[1, row, place], low.astype(jnp.int8), mask=inside)
        unit = jnp.where(largest < jnp.inf, unit, jnp.nan)
        plt.store(unit_ref.at[at, row], unit, mask=is_span)
        plt.store(total_ref.at[at, row], jnp.sum(whole, axis=1).astype(jnp.float32) * unit, mask=is_span)

    found = pl.pallas_call(
        kernel,
        grid=(M, -(-spans // at_once)),
        out_shape=[
            jax.ShapeDtypeStruct((2, M, K), jnp.int8),
            jax.ShapeDtypeStruct((spans, M), jnp.float32),
            jax.ShapeDtypeStruct((spans, M), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="span_bytes",
    )(x)
    return SpanBytes(*found)


def _input_of(place: Int32[Array, " n"], plane: int) -> Int32[Array, " n"]:
    """Which input stands at a place: bytes 2j and 2j + 1 of a block hold elements i·P + j and (4 + i)·P + j."""
    inner = lax.rem(place, 2 * FIELDS * plane)
    field, byte = lax.div(inner, 2 * plane), lax.rem(inner, 2 * plane)
    return place - inner + (FIELDS * lax.rem(byte, 2) + field) * plane + lax.div(byte, 2)


def _nearest(x: Array, assembly: bool) -> Array:
    """int32: rounded, half to even."""
    if not assembly:
        return jnp.round(x).astype(jnp.int32)
    shape = jax.ShapeDtypeStruct(x.shape, jnp.int32)
    [found] = plt.elementwise_inline_asm(
        "cvt.rni.s32.f32 $0, $1;", args=[x], constraints="=r,f", pack=1, result_shape_dtypes=[shape]
    )
    return found


def _quotient(one: int, other: Array, assembly: bool) -> Array:
    """Rounded as everywhere else: what the compiler makes of a division may be the number beside it."""
    if not assembly:
        return jnp.float32(one) / other
    [bits] = np.float32(one).reshape(1).view(np.uint32)
    text, shape = f"div.rn.f32 $0, 0f{bits:08x}, $1;", jax.ShapeDtypeStruct(other.shape, jnp.float32)
    [found] = plt.elementwise_inline_asm(text, args=[other], constraints="=f,f", pack=1, result_shape_dtypes=[shape])
    return found
