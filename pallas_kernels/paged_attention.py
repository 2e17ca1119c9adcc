"""Attention over a paged KV cache, as plain XLA: decode, and ragged prefill. The cache itself is `kv_pages.py`'s.

Contexts are read in chunks with a running softmax (flash attention, arXiv:2205.14135), as many as the longest context
of the step needs: the width of a page table costs nothing.

Slots behind the end of a context may hold anything, NaN included: they are masked in the logits and in V.

Where the cache holds codes, the scale of a token's K multiplies its logits and that of its V its weights.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention_work import QueryBlocks
from pallas_kernels.kv_pages import KVChunk, KVPages, read_chunk

CHUNK = 128  # tokens of context read at once
QUERY_BLOCK = 128  # tokens of one sequence that share a read of its context in prefill: the size of its blocks
NEVER = -1e30  # logit of a masked slot; finite, so that a fully masked chunk gives no NaN


def decode_attention(
    q: Float[Array, "B N H"],
    pages: KVPages,
    *,
    layer: Int32[Array, ""],
    page_table: Int32[Array, "B W"],
    lengths: Int32[Array, " B"],
    window: Int32[Array, ""],
    scale: float,
    softcap: float | None,
) -> Float32[Array, "B N H"]:
    """Attention of one query a sequence, at the last position of its context.

    Args:
        q: queries, rotated.
        pages: the cache, the queries' own positions included.
        layer: whose pages are read.
        page_table: pages of each sequence; behind its end anything.
        lengths: tokens of each context; 0 for a padded row, which yields zeros.
        window: how far back a query sees, itself included.
        scale: factor of the logits.
        softcap: logits become `softcap · tanh(logits / softcap)`.
    """
    N, H = q.shape[1:]
    K, S = pages.k.shape[2], pages.k.shape[3]
    per_chunk = max(1, CHUNK // S)
    span = per_chunk * S

    def row(inputs: tuple[Array, Array, Array]) -> Array:
        query, table, length = inputs
        query = query.reshape(K, N // K, H).astype(jnp.float32) * scale
        oldest = jnp.maximum(length - window, 0)

        def step(c: Array, carry: _Softmax) -> _Softmax:
            position = c * span + jnp.arange(span, dtype=jnp.int32)
            seen = (position >= oldest) & (position < length)
            ids = lax.dynamic_slice_in_dim(table, c * per_chunk, per_chunk)
            chunk = read_chunk(pages, layer=layer, ids=ids, seen=seen)
            logits = _capped(_logits(query, chunk), softcap)  # [K, G, span]
            return _accumulate(carry, jnp.where(seen, logits, NEVER), chunk)

        return _finish(lax.fori_loop(oldest // span, -(-length // span), step, _empty((K, N // K), H)))

    # Row by row, as each then reads its own context alone: for XLA:CPU that beats one gather for all rows, which costs
    # the longest context for each of them.
    return lax.map(row, (q, _padded(page_table, per_chunk), lengths)).reshape(-1, N, H)


def ragged_attention(
    q: Float[Array, "T N H"],
    pages: KVPages,
    blocks: QueryBlocks,
    *,
    layer: Int32[Array, ""],
    page_table: Int32[Array, "B W"],
    window: Int32[Array, ""],
    scale: float,
    softcap: float | None,
) -> Float32[Array, "T N H"]:
    """Causal attention of ragged runs of queries over their sequences' pages. Arguments as in `decode_attention`.

    Tokens behind the last row hold zeros.
    """
    T, N, H = q.shape
    K, S = pages.k.shape[2], pages.k.shape[3]
    per_chunk = max(1, CHUNK // S)
    G, M = N // K, min(QUERY_BLOCK, T)
    table = _padded(page_table, per_chunk)
    queries = jnp.pad(q.astype(jnp.float32) * scale, ((0, M), (0, 0), (0, 0)))

    def block(b: Array, out: Array) -> Array:
        row, token, last = blocks.row[b], blocks.token[b], blocks.position[b] + blocks.size[b]
        mine = lax.dynamic_slice_in_dim(queries, token, M).reshape(M, K, G, H)
        mine = mine.transpose(1, 2, 0, 3).reshape(K, G * M, H)
        at = jnp.tile(blocks.position[b] + jnp.arange(M, dtype=jnp.int32), G)[:, None]  # [G·M, 1]

        def step(c: Array, carry: _Softmax) -> _Softmax:
            ids = lax.dynamic_slice(table, (row, c * per_chunk), (1, per_chunk))[0]
            position = c * per_chunk * S + jnp.arange(per_chunk * S, dtype=jnp.int32)
            chunk = read_chunk(pages, layer=layer, ids=ids, seen=position < last)
            seen = (position[None] <= at) & (position[None] > at - window) & (position < last)[None]
            logits = _capped(_logits(mine, chunk), softcap)  # [K, G·M, span]
            return _accumulate(carry, jnp.where(seen[None], logits, NEVER), chunk)

        start = jnp.maximum(blocks.position[b] - window + 1, 0) // (per_chunk * S)
        stop = -(-last // (per_chunk * S))
        result = _finish(lax.fori_loop(start, stop, step, _empty((K, G * M), H)))  # [K, G·M, H]
        result = result.reshape(K, G, M, H).transpose(2, 0, 1, 3).reshape(M, N, H)
        # Blocks go in order, so what a block writes behind its own end is overwritten by the next one.
        valid = (jnp.arange(M) < blocks.size[b])[:, None, None]
        return lax.dynamic_update_slice_in_dim(out, jnp.where(valid, result, 0.0), token, axis=0)

    out = lax.fori_loop(0, blocks.used, block, jnp.zeros((T + M, N, H), jnp.float32))
    return out[:T]


class _Softmax(NamedTuple):
    """Running softmax of some queries: largest logit, sum of weights, weighted sum of V."""

    largest: Array
    total: Array
    acc: Array


def _empty(lead: tuple[int, ...], H: int) -> _Softmax:
    return _Softmax(
        jnp.full(lead, NEVER, jnp.float32), jnp.zeros(lead, jnp.float32), jnp.zeros((*lead, H), jnp.float32)
    )


def _logits(queries: Float32[Array, "K M H"], chunk: KVChunk) -> Float32[Array, "K M C"]:
    return _scaled(jnp.einsum("kmh,kch->kmc", queries, chunk.k), chunk.k_scale)


def _accumulate(carry: _Softmax, logits: Float32[Array, "K M C"], chunk: KVChunk) -> _Softmax:
    largest = jnp.maximum(carry.largest, jnp.max(logits, -1))
    weights = jnp.where(logits > NEVER, jnp.exp(logits - largest[..., None]), 0.0)
    decay = jnp.exp(carry.largest - largest)
    total = carry.total * decay + jnp.sum(weights, -1)
    values = jnp.einsum("kmc,kch->kmh", _scaled(weights, chunk.v_scale), chunk.v)
    return _Softmax(largest, total, carry.acc * decay[..., None] + values)


def _scaled(by_token: Float32[Array, "K M C"], scale: Float32[Array, "K C"] | None) -> Float32[Array, "K M C"]:
    return by_token if scale is None else by_token * scale[:, None]


def _finish(carry: _Softmax) -> Float32[Array, "*q H"]:
    return carry.acc / jnp.where(carry.total > 0, carry.total, 1.0)[..., None]


def _padded(page_table: Int32[Array, "B W"], multiple: int) -> Int32[Array, "B padded"]:
    """The table with scratch pages behind it, so that no chunk's slice is shifted back at the end."""
    return jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % multiple)))


def _capped(logits: Array, softcap: float | None) -> Array:
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)
