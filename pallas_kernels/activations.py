"""Activations as kernels of products read them, each made in one launch from what came before: from rows, from rows
that are added up and normalized, from gates and ups. XLA takes two to four launches, of which one ends before the next
begins, and with few rows that is what a step waits for.

Which form a product takes is its weight's and its tiles' to say: `planar_matmul.form_of`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, BFloat16, Float, Float32, Int8, Int32

from pallas_kernels.planar_weights import load

FIELDS = 4  # ternary codes of a byte
HIGH = 256  # what a high byte counts
_DIGITS = 14  # binary, of a number in two bytes, besides its sign
_SMALLEST_EXPONENT = 30  # of the largest of a span, biased: what is smaller counts as so large
_INPUTS_OF_A_WARP = 512
_INPUTS_OF_SPANS = 2048  # that one program rounds, where it needs no whole row


class Rows(NamedTuple):
    """Rows as they are."""

    x: Float[Array, "M K"]


class NormedRows(NamedTuple):
    """Rows divided by their root mean square, times one of a stack of scales (arXiv:1910.07467)."""

    x: Float[Array, "M K"]
    parts: Float32[Array, "splits M K"] | None  # what is added to `x` first
    scales: Float[Array, "L K"]
    layer: Int32[Array, ""]
    eps: float


class GatedRows(NamedTuple):
    """activate(gate) · up."""

    parts: Float32[Array, "splits M twoK"]  # sums to be added up, of gates and then of ups
    activate: Callable[[Array], Array]


Source = Rows | NormedRows | GatedRows


class InSpans(NamedTuple):
    """The form of `SpanBytes`."""

    span: int  # inputs that share a unit, a power of two


class InFields(NamedTuple):
    """The form of `FieldTokens`."""

    plane: int  # of the weights' words


class InPairs(NamedTuple):
    """bfloat16, in the order of weights whose planes are multiplied at once: pair by pair of each in turn."""

    plane: int
    together: int  # planes; 1: the order of inputs


IN_ORDER = InPairs(plane=2, together=1)
Form = InSpans | InFields | InPairs


class SpanBytes(NamedTuple):
    """Tokens in 15 bits with one unit for each span of inputs: x = (256 · high + low) · unit."""

    codes: Int8[Array, "2 M K"]  # high bytes, then low ones
    unit: Float32[Array, "spans M"]  # a power of two; NaN: the span holds what is no finite number
    total: Float32[Array, "spans M"]  # sum of the span


class FieldTokens(NamedTuple):
    """Tokens as `quantized_matmul.quantize_tokens` rounds them, in the order of a byte's fields."""

    codes: Int8[Array, "M K"]
    factor: Float32[Array, " M"]  # that undoes the rounding; NaN: the token holds what is no finite number
    total: Int32[Array, " M"]  # sum of the codes


Activations = SpanBytes | FieldTokens | BFloat16[Array, "M K"]


class Made(NamedTuple):
    """What a launch makes."""

    inputs: Any  # Activations
    total: Float32[Array, "M K"] | None  # rows with what was added to them; None: nothing was


def summed(parts: Array) -> Array:
    """A product's parts added up, which XLA does with whatever comes next."""
    return parts[0] if parts.shape[0] == 1 else jnp.sum(parts, axis=0)


def activations(source: Source, form: Form, *, interpret: bool = False) -> Made:
    """What a product reads.

    In spans, each input is rounded by at most 2^-15 of what its span's largest is below; whole numbers up to 2^13 stay
    exact. In fields, a token is rounded to eight bits of its largest; in pairs, numbers are rounded to bfloat16.

    Args:
        source: what it is made from.
        form: how the product takes it.
        interpret: run the kernel's steps as plain JAX, on any device.
    """
    if isinstance(form, InPairs) and not isinstance(source, NormedRows):
        return Made(_in_pairs(_computed(source), form), None)  # which XLA makes in one launch too
    arrays, read = _reader(source)
    M, K = arrays[0].shape[-2], arrays[0].shape[-1] // (2 if isinstance(source, GatedRows) else 1)
    is_whole = isinstance(source, NormedRows) or not isinstance(form, InSpans)  # a program needs all of a row
    shapes, store = form_writer(form, M, K, assembly=not interpret)
    adds = isinstance(source, NormedRows) and source.parts is not None
    if adds:
        shapes = [*shapes, jax.ShapeDtypeStruct((M, K), jnp.float32)]
    span = form.span if isinstance(form, InSpans) else 1
    spans = K // span
    at_once = pl.next_power_of_2(spans) if is_whole else max(1, _INPUTS_OF_SPANS // span)

    def kernel(*refs: Any) -> None:
        ins, outs = refs[: len(arrays)], refs[len(arrays) :]
        row, at = pl.program_id(0), pl.program_id(1) * at_once + lax.iota(jnp.int32, at_once)
        is_span = at < spans
        place, inside = at, is_span
        if isinstance(form, InSpans):
            place, inside = at[:, None] * span + lax.iota(jnp.int32, span)[None, :], is_span[:, None]
        elif isinstance(form, InFields):
            place = _input_of(at, form.plane)
        values, total = read(ins, row, place, inside)
        store(outs, values, row, at, is_span)
        if adds:
            plt.store(outs[-1].at[row, place], total, mask=inside)

    found = pl.pallas_call(
        kernel,
        grid=(M, pl.cdiv(spans, at_once)),
        out_shape=shapes,
        compiler_params=plt.CompilerParams(
            num_warps=min(16, max(4, at_once * span // _INPUTS_OF_A_WARP)), num_stages=1
        ),
        interpret=interpret,
        name=f"activations_{type(source).__name__}_{type(form).__name__}",
    )(*arrays)
    return Made(as_activations(found, form), found[-1] if adds else None)


def as_activations(arrays: Sequence[Array], form: Form) -> Activations:
    """The first of some arrays, as many as a form has."""
    if isinstance(form, InPairs):
        return arrays[0]
    return SpanBytes(*arrays[:3]) if isinstance(form, InSpans) else FieldTokens(*arrays[:3])


def _computed(source: Rows | GatedRows) -> Float[Array, "M K"]:
    if isinstance(source, Rows):
        return source.x
    gate, up = jnp.split(summed(source.parts), 2, axis=-1)
    return source.activate(gate) * up


def _in_pairs(x: Float[Array, "M K"], form: InPairs) -> BFloat16[Array, "M K"]:
    M, K = x.shape
    if form.together == 1:
        return x.astype(jnp.bfloat16)
    pairs = x.astype(jnp.bfloat16).reshape(M, -1, form.together, form.plane // 2, 2)
    return pairs.swapaxes(2, 3).reshape(M, K)


def _reader(source: Source) -> tuple[list[Array], Callable[..., tuple[Array, Array]]]:
    """Arrays of a source, the first of which has its rows, and what reads some numbers of a row out of them: what a
    product multiplies, and what was normalized for it."""
    if isinstance(source, Rows):

        def read(refs: Any, row: Any, place: Array, inside: Array) -> tuple[Array, Array]:
            x = load(refs[0], (row, place), inside).astype(jnp.float32)
            return x, x

        return [source.x], read
    if isinstance(source, GatedRows):
        S, _, width = source.parts.shape

        def read_gated(refs: Any, row: Any, place: Array, inside: Array) -> tuple[Array, Array]:
            gate, up = (
                sum(load(refs[0], (part, row, place + first), inside) for part in range(S)) for first in (0, width // 2)
            )
            h = source.activate(jnp.asarray(gate)) * up
            return h, h

        return [source.parts], read_gated
    K, parts = source.x.shape[1], source.parts

    def read_normed(refs: Any, row: Any, place: Array, inside: Array) -> tuple[Array, Array]:
        total = load(refs[0], (row, place), inside).astype(jnp.float32)
        for part in range(0 if parts is None else parts.shape[0]):
            total = total + load(refs[3], (part, row, place), inside)
        square = total * total
        for _ in range(total.ndim):  # Triton reduces one axis at a time
            square = jnp.sum(square, axis=square.ndim - 1)
        factor = lax.rsqrt(square / K + source.eps)
        return total * factor * load(refs[1], (refs[2][0], place), inside).astype(jnp.float32), total

    return [source.x, source.scales, source.layer.reshape(1), *([] if parts is None else [parts])], read_normed


def form_writer(
    form: Form, M: int, K: int, *, assembly: bool
) -> tuple[list[jax.ShapeDtypeStruct], Callable[..., None]]:
    """Arrays of a form, and what writes some numbers of a row into them."""
    if isinstance(form, InSpans):
        spans = K // form.span
        units = jax.ShapeDtypeStruct((spans, M), jnp.float32)
        return [jax.ShapeDtypeStruct((2, M, K), jnp.int8), units, units], _span_writer(form.span, assembly)
    if isinstance(form, InFields):
        of_row = [jax.ShapeDtypeStruct((M,), dtype) for dtype in (jnp.float32, jnp.int32)]
        return [jax.ShapeDtypeStruct((M, K), jnp.int8), *of_row], _field_writer(assembly)
    width = form.plane * form.together

    def store(outs: Any, values: Array, row: Any, at: Array, inside: Array) -> None:
        inner = lax.rem(at, width)
        plane, pair = lax.div(inner, form.plane), lax.div(lax.rem(inner, form.plane), 2)
        place = at - inner + (pair * form.together + plane) * 2 + lax.rem(at, 2)
        plt.store(outs[0].at[row, place], values.astype(jnp.bfloat16), mask=inside)

    return [jax.ShapeDtypeStruct((M, K), jnp.bfloat16)], store


def _span_writer(span: int, assembly: bool) -> Callable[..., None]:
    def store(outs: Any, values: Float32[Array, "spans span"], row: Any, at: Array, is_span: Array) -> None:
        codes_ref, unit_ref, total_ref = outs[:3]
        place, inside = at[:, None] * span + lax.iota(jnp.int32, span)[None, :], is_span[:, None]
        sizes = jnp.abs(values)
        largest = jnp.max(jnp.where(sizes < jnp.inf, sizes, jnp.inf), axis=1)  # a maximum may leave NaN out
        exponent = lax.bitcast_convert_type(largest, jnp.int32) >> 23  # biased by 127
        exponent = jnp.maximum(exponent, _SMALLEST_EXPONENT) - (_DIGITS - 1)
        unit, inverse = (lax.bitcast_convert_type(power << 23, jnp.float32) for power in (exponent, 254 - exponent))
        scaled = jnp.where(sizes < jnp.inf, values * inverse[:, None], 0.0)
        whole = _nearest(scaled, assembly)
        low = ((whole + HIGH // 2) & (HIGH - 1)) - HIGH // 2
        plt.store(codes_ref.at[0, row, place], ((whole - low) >> 8).astype(jnp.int8), mask=inside)
        plt.store(codes_ref.at[1, row, place], low.astype(jnp.int8), mask=inside)
        unit = jnp.where(largest < jnp.inf, unit, jnp.nan)
        plt.store(unit_ref.at[at, row], unit, mask=is_span)
        plt.store(total_ref.at[at, row], jnp.sum(whole, axis=1).astype(jnp.float32) * unit, mask=is_span)

    return store


def _field_writer(assembly: bool) -> Callable[..., None]:
    def store(outs: Any, values: Float32[Array, " width"], row: Any, at: Array, inside: Array) -> None:
        codes_ref, factor_ref, total_ref = outs[:3]
        sizes = jnp.abs(values)
        largest = jnp.max(jnp.where(sizes < jnp.inf, sizes, jnp.inf), axis=0)[None]  # a maximum may leave NaN out
        scale = _quotient(127, jnp.maximum(largest, 1e-5), assembly)
        scaled = values * scale
        codes = jnp.where(jnp.abs(scaled) < jnp.inf, _nearest(scaled, assembly), 0)
        codes = jnp.clip(codes, -128, 127)
        plt.store(codes_ref.at[row, at], codes.astype(jnp.int8), mask=inside)
        factor = jnp.where(largest < jnp.inf, _quotient(1, scale, assembly), jnp.nan)
        plt.store(factor_ref.at[row + lax.iota(jnp.int32, 1)], factor)
        plt.store(total_ref.at[row], jnp.sum(codes, axis=0))

    return store


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
