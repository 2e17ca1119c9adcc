"""Reductions over the vocabulary: maximum, argmax and the likeliest n by blocks, and sums of integers.

Owns how an array of B rows and V tokens is walked. On XLA:CPU a plain float reduction over contiguous blocks is many
times faster than one over integers or with a comparison fused in: so the largest are found in one such pass and a
look into few blocks, and sums of integers are taken in f32, in parts small enough to be exact in any order of adding.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from atoma_jax.engine.vocab_shards import WHOLE, VocabShards

BLOCK = 128  # tokens


def to_blocks(x: Array, fill: float | int, width: int = BLOCK) -> Array:
    """[B, V] → [B, ⌈V / width⌉, width]; `fill` stands in the places past the vocabulary."""
    rest = -x.shape[1] % width
    if rest:
        x = jnp.pad(x, ((0, 0), (0, rest)), constant_values=fill)
    return x.reshape(x.shape[0], -1, width)


def take_blocks(blocks: Array, index: Int32[Array, "B n"]) -> Array:
    """The blocks index[b] of blocks [B, N, W], for every row b: [B, n, W]."""
    return jnp.take_along_axis(blocks, index[:, :, None], axis=1, mode="clip")


def block_max(x: Float32[Array, "B V"]) -> Float32[Array, "B N"]:
    """The largest of each block; anything where one holds a NaN, which XLA:CPU may pass over."""
    return jnp.max(to_blocks(x, -jnp.inf), axis=2)


def argmax(x: Float32[Array, "B V"], tops: Float32[Array, "B N"], shards: VocabShards = WHOLE) -> Int32[Array, " B"]:
    """The first of each row's largest, given `block_max(x)`; any id of the vocabulary where a row holds NaN."""
    top = jnp.max(tops, axis=1)
    block = first_index(tops == top[:, None])
    place = first_index(take_blocks(to_blocks(x, -jnp.inf), block[:, None])[:, 0] == top[:, None])
    own = jnp.minimum(block * BLOCK + place, x.shape[1] - 1)
    if shards.count == 1:
        return own
    _, found = shards.merged_top(top[:, None], (own + shards.first(x.shape[1]))[:, None], 1)
    return found[:, 0]


def largest(
    x: Float32[Array, "B V"], tops: Float32[Array, "B N"], n: int, shards: VocabShards = WHOLE
) -> tuple[Float32[Array, "B n"], Int32[Array, "B n"]]:
    """The n largest of each row and their ids, given `block_max(x)`: descending, of equal ones the lower id first.

    They lie in the n blocks with the largest maxima: each block before another in that order holds a token that is
    before all of the other's. Of a vocabulary that is cut, each part has its own n.
    """
    if shards.count > 1:
        own, ids = largest(x, tops, min(n, x.shape[1]))
        return shards.merged_top(own, ids + shards.first(x.shape[1]), n)
    _, chosen = lax.top_k(tops, min(n, tops.shape[1]))  # [B, n]
    chosen = jnp.sort(chosen, axis=1)  # so that top_k meets equal values in the order of their ids
    near = take_blocks(to_blocks(x, -jnp.inf), chosen)  # [B, n, W]
    ids = chosen[:, :, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
    values, places = lax.top_k(near.reshape(x.shape[0], -1), n)
    return values, jnp.take_along_axis(ids.reshape(x.shape[0], -1), places, axis=1, mode="clip")


def count(flags: Bool[Array, "B N"]) -> Int32[Array, " B"]:
    """How many are true, for N up to 2^24."""
    return jnp.sum(flags, axis=1, dtype=jnp.float32).astype(jnp.int32)


def low_bits(terms: int) -> int:
    """Bits of the lower part in an exact sum of so many terms, for `exact_sum`: at most 7."""
    return min(7, (2**24 // terms + 1).bit_length() - 1)


def exact_sum(x: Int32[Array, "... N"], low: int) -> Int32[Array, "..."]:
    """Sum over the last axis of integers ≥ 0, the same for any order of adding.

    Upper and lower parts are added as f32, each partial sum being an integer below 2^24, which f32 holds exactly.

    Args:
        x: with a sum below 2^(24 + low).
        low: at most `low_bits(N)`.
    """
    upper = jnp.sum((x >> low).astype(jnp.float32), axis=-1).astype(jnp.int32)
    lower = jnp.sum((x & ((1 << low) - 1)).astype(jnp.float32), axis=-1).astype(jnp.int32)
    return (upper << low) + lower


def first_index(flags: Bool[Array, "B N"]) -> Int32[Array, " B"]:
    """Index of the first true of each row; N where none is. N is at most 2^24."""
    N = flags.shape[1]
    return jnp.min(jnp.where(flags, jnp.arange(N, dtype=jnp.float32), N), axis=1).astype(jnp.int32)
