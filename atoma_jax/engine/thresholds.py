"""Where top-k and top-p cut a row of logits, without sorting it.

Owns the search; the probabilities come in as integers (`draw.py`), so that every sum is exact and the cut does not
depend on how a backend, a batch size or a sharding adds. The tokens at or above the cut are exactly those that a sorted
row would keep, with every token that ties with the last of them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from atoma_jax.engine.vocab_blocks import count
from atoma_jax.engine.vocab_shards import WHOLE, VocabShards

NEAR = 512  # the likeliest tokens: a cut among them needs no look at the others


def order_of(x: Float32[Array, "..."]) -> Int32[Array, "..."]:
    """Integers in the order of floats, equal where the floats are."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def mass_above(order: Array, weights: Array, cut: Array) -> Int32[Array, " B"]:
    """Weight of the tokens at or above the cut."""
    return jnp.sum(jnp.where(order >= cut[:, None], weights, 0), axis=1)


def find_cut(
    logits: Float32[Array, "B V"],
    weights: Int32[Array, "B V"],
    floor: Int32[Array, " B"],
    ceiling: Int32[Array, " B"],
    top_k: Int32[Array, " B"],
    top_p: Float32[Array, " B"],
    shards: VocabShards = WHOLE,
) -> Int32[Array, " B"]:
    """Order numbers at or above which lies what top-k, and of its weight top-p, keep.

    Args:
        logits: without NaN in the rows that filter.
        weights: probabilities in any integer unit, with a sum below 2^31.
        floor: order number below which nothing is kept.
        ceiling: order number of the largest logit.
        top_k: 0 in rows without.
        top_p: 1 in rows without.
        shards: how the vocabulary is cut, of which `logits` and `weights` hold this device's part.
    """
    V = shards.size(logits.shape[1])
    top_k = jnp.where(top_k < V, top_k, 0)
    filters = (top_k > 0) | (top_p < 1)

    def search_all(logits: Array, weights: Array) -> Array:
        order = order_of(logits)
        complete = jnp.ones_like(filters)
        mass = shards.total(mass_above(order, weights, floor))
        return _search(order, weights, (floor, ceiling), complete, mass, top_k, top_p, shards)

    def search(logits: Array, weights: Array) -> Array:
        if V <= 4 * NEAR:
            return search_all(logits, weights)
        # Behind the barrier: slices that XLA merges into its top-k make it a sort of the whole row.
        values, ids = lax.top_k(logits, min(NEAR + 1, logits.shape[1]))
        if shards.count == 1:
            # One barrier each: on one around both, XLA fails when it compiles for several devices.
            values, payload = lax.optimization_barrier(values), lax.optimization_barrier(ids)
        else:  # the likeliest of each part, with their weights
            own = jnp.take_along_axis(weights, ids, axis=1, mode="clip")
            values, payload = shards.merged_top(values, own, NEAR + 1)
        near, outside = order_of(values[:, :NEAR]), order_of(values[:, NEAR])
        near_weights = payload[:, :NEAR]
        if shards.count == 1:
            near_weights = jnp.take_along_axis(weights, near_weights, axis=1, mode="clip")
        bounds = (jnp.maximum(floor, outside), ceiling)
        mass = shards.total(mass_above(order_of(logits), weights, floor))
        found = _search(near, near_weights, bounds, floor > outside, mass, top_k, top_p, WHOLE)
        unsure = jnp.any(filters & (found <= outside))
        return lax.cond(unsure, search_all, lambda *_: jnp.where(filters, found, floor), logits, weights)

    return lax.cond(jnp.any(filters), search, lambda *_: floor, logits, weights)


class _Bracket(NamedTuple):
    """A row's bounds of the cut: `low` keeps enough tokens (or is the floor), `high` too few."""

    low: Array
    high: Array
    count_low: Array  # tokens at or above `low`; at the floor not known, and more than any
    count_high: Array
    mass_low: Array  # their weight
    need: Array  # of tokens while `by_count`, else of weight
    by_count: Array  # in search of top-k's cut, which comes first
    active: Array


def _search(
    order: Array,
    weights: Array,
    bounds: tuple[Array, Array],
    complete: Array,
    mass: Array,
    top_k: Array,
    top_p: Array,
    shards: VocabShards,
) -> Int32[Array, " B"]:
    """Raises the lower bound, of whose tokens `mass` is the weight, to what top-k and then top-p keep, by bisection.

    Rows that do not filter stay at it. So does a row that is not `complete` (tokens at or above the bound are out of
    sight) and asks for more than is in sight. At most 32 passes for each of the two filters; a row is done when one
    token is left between its bounds, most often after about ten.
    """
    floor, end = bounds[0], bounds[1] + 1

    def settle(b: _Bracket) -> _Bracket:
        """Rows whose bracket holds a single cut go on from top-k to top-p, or end."""
        closed = b.active & ((b.low >= b.high - 1) | (b.count_low - b.count_high == 1))
        turn = closed & b.by_count & (complete | (b.low > floor)) & (top_p < 1)
        return b._replace(
            high=jnp.where(turn, end, b.high),
            count_high=jnp.where(turn, 0, b.count_high),
            need=jnp.where(turn, _needed(b.mass_low, top_p), b.need),
            by_count=b.by_count & ~turn,
            # A lone token kept by top-k is all that top-p could keep.
            active=b.active & (~closed | (turn & (b.count_low > 1))),
        )

    def narrow(b: _Bracket) -> _Bracket:
        middle = (b.low & b.high) + ((b.low ^ b.high) >> 1)  # the mean, rounded down, without overflow
        kept = order >= middle[:, None]
        number = shards.total(count(kept))
        mass = shards.total(mass_above(order, weights, middle))
        enough = jnp.where(b.by_count, number, mass) >= b.need
        up, down = b.active & enough, b.active & ~enough
        return settle(
            b._replace(
                low=jnp.where(up, middle, b.low),
                high=jnp.where(down, middle, b.high),
                count_low=jnp.where(up, number, b.count_low),
                count_high=jnp.where(down, number, b.count_high),
                mass_low=jnp.where(up, mass, b.mass_low),
            )
        )

    by_count = top_k > 0
    start = _Bracket(
        low=floor,
        high=end,
        count_low=jnp.full_like(floor, shards.size(order.shape[1]) + 2),
        count_high=jnp.zeros_like(floor),
        mass_low=mass,
        need=jnp.where(by_count, top_k, _needed(mass, top_p)),
        by_count=by_count,
        active=(by_count | (top_p < 1)) & (floor < end - 1),
    )
    return lax.while_loop(lambda b: jnp.any(b.active), narrow, start).low


def _needed(mass: Array, top_p: Array) -> Array:
    """The weight that top-p asks for; the product's rounding, 2^-24 of the mass, is finer than a probability in f32."""
    return jnp.maximum(jnp.ceil(mass.astype(jnp.float32) * top_p), 1).astype(jnp.int32)
