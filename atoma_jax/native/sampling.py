"""Typed calls of the kernels for rows of logits (`src/sampling.h`): random tokens, and what logprobs are made of."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32


def draw(
    logits: Float32[Array, "B V"],
    *,
    top: Float32[Array, " B"],
    temperature: Float32[Array, " B"],
    floor: Float32[Array, " B"],
    top_k: Int32[Array, " B"],
    top_p: Float32[Array, " B"],
    bits: UInt32[Array, " B"],
    active: Bool[Array, " B"],
) -> Int32[Array, " B"]:
    """A random token of each active row, 0 in the others. It depends on that row alone.

    Args:
        logits: without NaN in active rows.
        top: the largest of each row, finite in active ones.
        temperature: above 0.
        floor: logits below it are not kept; at most `top`, and -inf keeps all.
        top_k: 0: without.
        top_p: 1: without.
        bits: random ones, which pick the token.
        active: rows to draw for.
    """
    tokens = jax.ShapeDtypeStruct(top.shape, jnp.int32)
    return jax.ffi.ffi_call("atoma_draw", tokens)(logits, top, temperature, floor, top_k, top_p, bits, active)


def survey(
    logits: Float32[Array, "B V"],
    *,
    top: Float32[Array, " B"],
    tokens: Int32[Array, " B"],
    active: Bool[Array, " B"],
) -> tuple[Float32[Array, " B"], Int32[Array, " B"]]:
    """Of each row log Σ e^logit, and the rank of one token: 1 for the likeliest, of equal ones the lower id first.

    Args:
        logits: summed in float64, 128 at a time in float32.
        top: the largest of each row.
        tokens: one of each row.
        active: rows that ask; the others get zeros.
    """
    results = jax.ShapeDtypeStruct(top.shape, jnp.float32), jax.ShapeDtypeStruct(top.shape, jnp.int32)
    norms, ranks = jax.ffi.ffi_call("atoma_survey", results)(logits, top, tokens, active)
    return norms, ranks
