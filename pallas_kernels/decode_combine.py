"""Attention of rows that decode, put together from the parts of their contexts, as a Pallas kernel (Triton): flash
decoding's second step (arXiv:2311.01282 §3). It can write what comes out in the form that the next product takes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float32, Int32

from pallas_kernels.activations import Activations, Form, InPairs, InSpans, as_activations, form_writer
from pallas_kernels.paged_attention import NEVER

COMBINED_AT_ONCE = 16  # parts


class DecodedParts(NamedTuple):
    """What decode leaves: attention of rows that have one part, and what others are to be made of, part by part."""

    rows: Int32[Array, "B 2"]  # as in `DecodeParts`
    acc: Float32[Array, "parts N H"]  # weighted sums of V
    largest: Float32[Array, "parts N"]  # logits, in ln 2
    total: Float32[Array, "parts N"]  # sums of weights
    out: Float32[Array, "T N H"]


def combined(decoded: DecodedParts, *, interpret: bool = False) -> Float32[Array, "T N H"]:
    """Attention of rows that decode. Tokens of other rows are left as they happen to be."""
    (T, N, H), B = decoded.out.shape, decoded.rows.shape[0]

    def kernel(rows: Any, acc: Any, largest: Any, total: Any, _: Any, out: Any) -> None:
        row, head, dims = pl.program_id(0), pl.program_id(1), jnp.arange(pl.next_power_of_2(H), dtype=jnp.int32)
        num_parts = rows[row, 1]

        @pl.when(num_parts > 1)
        def _() -> None:
            whole = _combined(rows[row, 0], num_parts, acc, largest, total, head, dims, H)
            plt.store(out.at[row, head, dims], whole, mask=dims < H)

    return pl.pallas_call(
        kernel,
        grid=(B, N),
        out_shape=jax.ShapeDtypeStruct((T, N, H), jnp.float32),
        input_output_aliases={4: 0},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="paged_attention_combine",
    )(*decoded)


def can_write(decoded: DecodedParts, form: Form) -> bool:
    """Whether `combined_activations` makes a form: a program has one head of a row, and each row decodes."""
    T, _, H = decoded.out.shape
    every_row = decoded.rows.shape[0] == T
    return every_row and (isinstance(form, InPairs) or (isinstance(form, InSpans) and H % form.span == 0))


def combined_activations(decoded: DecodedParts, form: Form, *, interpret: bool = False) -> Activations:
    """Attention of T rows, each of which decodes or is empty, in the form that a product takes."""
    T, N, H = decoded.out.shape
    shapes, store = form_writer(form, T, N * H, assembly=not interpret)
    width, span = pl.next_power_of_2(H), form.span if isinstance(form, InSpans) else 1

    def kernel(rows: Any, acc: Any, largest: Any, total: Any, out: Any, *outs: Any) -> None:
        row, head, dims = pl.program_id(0), pl.program_id(1), jnp.arange(width, dtype=jnp.int32)
        num_parts, inside = rows[row, 1], dims < H
        alone = plt.load(out.at[row, head, dims], mask=inside & (num_parts == 1), other=0.0)
        several = _combined(rows[row, 0], jnp.where(num_parts > 1, num_parts, 0), acc, largest, total, head, dims, H)
        values = jnp.where(num_parts > 1, several, alone)
        at = jnp.arange(width // span, dtype=jnp.int32)
        values = values.reshape(width // span, span) if isinstance(form, InSpans) else values
        store(outs, values, row, head * (H // span) + at, at < H // span)

    found = pl.pallas_call(
        kernel,
        grid=(T, N),
        out_shape=shapes,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=f"paged_attention_combine_{type(form).__name__}",
    )(*decoded)
    return as_activations(found, form)


def _combined(
    first: Any, num_parts: Any, acc: Any, largest: Any, total: Any, head: Any, dims: Array, H: int
) -> Float32[Array, " width"]:
    """The whole of one row and query head from its parts, in order; of no parts NaN."""

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        summed, peak, weight = carry
        part = i * COMBINED_AT_ONCE + jnp.arange(COMBINED_AT_ONCE, dtype=jnp.int32)
        exists = part < num_parts
        item = first + part
        logits = plt.load(largest.at[item, head], mask=exists, other=NEVER)
        totals = plt.load(total.at[item, head], mask=exists, other=0.0)
        sums = plt.load(acc.at[item[:, None], head, dims[None]], mask=exists[:, None] & (dims < H)[None], other=0.0)
        higher = jnp.maximum(peak, jnp.max(logits, axis=0))
        decay, factor = jnp.exp2(peak - higher), jnp.exp2(logits - higher)
        return (
            summed * decay + jnp.sum(sums * factor[:, None], axis=0),
            higher,
            weight * decay + jnp.sum(totals * factor, axis=0),
        )

    begin = jnp.zeros(dims.shape[0], jnp.float32), jnp.float32(NEVER), jnp.float32(0)
    summed, _peak, weight = lax.fori_loop(0, pl.cdiv(num_parts, COMBINED_AT_ONCE), step, begin)
    return summed / weight
