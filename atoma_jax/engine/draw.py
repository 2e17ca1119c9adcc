"""Draws one token a row from its distribution: temperature, min-p, top-k, top-p, then one uniform number.

Owns the arithmetic that makes a draw a function of the row's logits and (seed, position, sample index) alone.
After the exponential everything is exact integer arithmetic: probabilities are rounded to multiples of a unit of about
2^-30 (2^-29 above 132,104 tokens), and sums of integers do not depend on the order in which a backend, a batch size or
a sharding adds them up. A token whose probability is less than half a unit is never drawn.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from atoma_jax import ops
from atoma_jax.engine.sampling_rows import SamplingRows
from atoma_jax.engine.threefry import threefry_2x32
from atoma_jax.engine.thresholds import find_cut, order_of
from atoma_jax.engine.vocab_blocks import BLOCK, exact_sum, first_index, low_bits, take_blocks, to_blocks
from atoma_jax.engine.vocab_shards import WHOLE, VocabShards

NORM_BITS = 17  # fixed point of the normalizer: a block's sum is exact in f32


def draw(
    logits: Float32[Array, "B V"],
    top: Float32[Array, " B"],
    rows: SamplingRows,
    active: Bool[Array, " B"],
    shards: VocabShards = WHOLE,
    *,
    native: bool = False,
) -> Int32[Array, " B"]:
    """A random token of each active row; any id of the vocabulary in the others.

    Args:
        logits: after the rows' rules.
        top: the largest of each row: finite in active rows, which hold no NaN.
        rows: their settings; the temperature of active rows is positive.
        active: rows to draw for.
        shards: how the vocabulary is cut, of which `logits` holds this device's part.
        native: the native kernel draws, by the same definition; the vocabulary is whole.
    """
    temperature = jnp.where(active, rows.temperature, 1.0)
    floor = top + temperature * jnp.log(rows.min_p)  # without min-p -inf, which keeps everything
    top_k = jnp.where(active, rows.top_k, 0)
    top_p = jnp.where(active, rows.top_p, 1.0)
    if native:
        assert shards.count == 1, "the kernel sees one part"
        settings = {"top": top, "temperature": temperature, "floor": floor, "top_k": top_k, "top_p": top_p}
        return ops.native_draw(logits, **settings, bits=_random_bits(rows), active=active)
    weights = _weights(logits, top, temperature, shards)
    cut = find_cut(logits, weights, order_of(floor), order_of(top), top_k, top_p, shards)
    kept = to_blocks(jnp.where(order_of(logits) >= cut[:, None], weights, 0), 0)  # [B, N, W]
    ends = _running_sums(exact_sum(kept, low_bits(shards.size(logits.shape[1]))))  # [B, N]
    at, mine = _own_place(_random_bits(rows), ends[:, -1], shards)
    block, at = _locate(ends, at)
    place, _ = _locate(_running_sums(take_blocks(kept, block[:, None])[:, 0]), at)
    own = jnp.minimum(block * BLOCK + place, logits.shape[1] - 1)
    if mine is None:
        return own
    return shards.total(jnp.where(mine, own + shards.first(logits.shape[1]), 0))


def _weights(logits: Array, top: Array, temperature: Array, shards: VocabShards) -> Int32[Array, "B V"]:
    """Probabilities in units of about `2^-(23 + low_bits(V))`: they add up to less than `2^(24 + low_bits(V))`."""
    V = shards.size(logits.shape[1])
    exps = jnp.exp((logits - top[:, None]) / temperature[:, None])  # in [0, 1]
    # The normalizer only sets the unit, so it may be coarse; rounded up, it keeps the weights' sum below the limit.
    sums = jnp.sum(to_blocks(jnp.ceil(exps * 2.0**NORM_BITS), 0.0), axis=2)  # [B, N], integers up to 2^24
    norm = shards.total(exact_sum(sums.astype(jnp.int32), low_bits(V))).astype(jnp.float32)
    scale = 2.0 ** (23 + low_bits(V) + NORM_BITS) / norm
    return jnp.round(exps * scale[:, None]).astype(jnp.int32)


def _own_place(bits: Array, total: Array, shards: VocabShards) -> tuple[Int32[Array, " B"], Bool[Array, " B"] | None]:
    """The drawn place in this part's own sum of weights, and whether it lies in there; None where there is one part."""
    if shards.count == 1:
        return _scaled(bits, total), None
    totals = shards.stacked(total)  # [parts, B]
    earlier = (jnp.arange(shards.count, dtype=jnp.int32) < shards.first(1))[:, None]
    at = _scaled(bits, jnp.sum(totals, axis=0)) - jnp.sum(jnp.where(earlier, totals, 0), axis=0)
    return at, (at >= 0) & (at < total)


def _random_bits(rows: SamplingRows) -> UInt32[Array, " B"]:
    """32 random bits a row: a function of seed, position and sample index alone."""
    counter = (rows.position.astype(jnp.uint32), rows.sample_index.astype(jnp.uint32))
    return threefry_2x32((rows.seed[:, 0], rows.seed[:, 1]), counter)[0]


def _scaled(bits: Array, total: Array) -> Int32[Array, " B"]:
    """⌊bits · total / 2^32⌋ in 32-bit words: below total where that is positive."""
    total = total.astype(jnp.uint32)
    a, b = bits >> 16, bits & 0xFFFF
    c, d = total >> 16, total & 0xFFFF
    carry = ((b * d) >> 16) + ((a * d) & 0xFFFF) + ((b * c) & 0xFFFF)
    return (a * c + ((a * d) >> 16) + ((b * c) >> 16) + (carry >> 16)).astype(jnp.int32)


def _running_sums(x: Int32[Array, "B N"]) -> Int32[Array, "B N"]:
    """Sums of each row up to and including each place, by doubling: `jnp.cumsum` takes twice as long to compile."""
    N = x.shape[1]
    padding = jnp.zeros_like(x)

    def add_shifted(level: Array, sums: Array) -> Array:
        return sums + lax.dynamic_slice_in_dim(jnp.concatenate([padding, sums], axis=1), N - (1 << level), N, axis=1)

    return lax.fori_loop(0, (N - 1).bit_length(), add_shifted, x)


def _locate(ends: Int32[Array, "B N"], at: Int32[Array, " B"]) -> tuple[Int32[Array, " B"], Int32[Array, " B"]]:
    """Which of the intervals laid end to end `at` lies in, and how far into it."""
    index = first_index(ends > at[:, None])
    before = jnp.take_along_axis(ends, jnp.maximum(index - 1, 0)[:, None], axis=1, mode="clip")[:, 0]
    return index, at - jnp.where(index > 0, before, 0)
