"""Logprob, rank and likeliest tokens of the model's true distribution: raw logits, before any rule or temperature."""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from atoma_jax import ops
from atoma_jax.engine.vocab_blocks import count, largest, to_blocks
from atoma_jax.engine.vocab_shards import WHOLE, VocabShards


@no_type_check  # JAX also fills it with abstract values
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Zeros in rows that did not ask."""

    logprob: Float32[Array, " B"]
    rank: Int32[Array, " B"]  # 1 for the likeliest; of equal tokens the lower id comes first
    top_ids: Int32[Array, "B n"]  # by rank
    top_logprobs: Float32[Array, "B n"]


def token_logprobs(
    logits: Float32[Array, "B V"],
    tops: Float32[Array, "B N"],
    tokens: Int32[Array, " B"],
    asked: Bool[Array, " B"],
    num_top: int,
    shards: VocabShards = WHOLE,
    *,
    native: bool = False,
) -> TokenLogprobs:
    """Those of one token a row, and the `num_top` likeliest, given `block_max(logits)`.

    Costs nothing in steps where no row asks. `native`: the native kernel adds up and counts; the vocabulary is whole.
    """
    B = logits.shape[0]
    nothing = TokenLogprobs(
        logprob=jnp.zeros(B, jnp.float32),
        rank=jnp.zeros(B, jnp.int32),
        top_ids=jnp.zeros((B, num_top), jnp.int32),
        top_logprobs=jnp.zeros((B, num_top), jnp.float32),
    )

    def compute(logits: Array, tops: Array, tokens: Array, asked: Array) -> TokenLogprobs:
        top = shards.largest(jnp.max(tops, axis=1))
        places, there = (tokens, None) if shards.count == 1 else shards.own(tokens, logits.shape[1])
        chosen = jnp.take_along_axis(logits, places[:, None], axis=1, mode="clip")  # [B, 1]
        if there is not None:
            chosen = shards.total(jnp.where(there[:, None], chosen, 0.0))
        if native:
            norm, rank = ops.native_survey(logits, top=top, tokens=tokens, active=asked)
        else:
            norm, rank = _survey(logits, top, chosen, tokens, shards)
        values, top_ids = largest(logits, tops, num_top, shards)
        return TokenLogprobs(
            logprob=jnp.where(asked, chosen[:, 0] - norm, 0.0),
            rank=jnp.where(asked, rank, 0),
            top_ids=jnp.where(asked[:, None], top_ids, 0),
            top_logprobs=jnp.where(asked[:, None], values - norm[:, None], 0.0),
        )

    assert not native or shards.count == 1, "the kernel sees one part"
    return lax.cond(jnp.any(asked), compute, lambda *_: nothing, logits, tops, tokens, asked)


def _survey(
    logits: Array, top: Array, chosen: Array, tokens: Array, shards: VocabShards
) -> tuple[Float32[Array, " B"], Int32[Array, " B"]]:
    """Of each row log Σ e^logit, and the rank of a token whose logit is `chosen`."""
    exps = jnp.exp(logits - top[:, None])
    norm = top + jnp.log(shards.total(jnp.sum(jnp.sum(to_blocks(exps, 0.0), axis=2), axis=1)))
    V = logits.shape[1]
    ids = jnp.arange(V, dtype=jnp.int32)
    if shards.count > 1:
        ids += shards.first(V)
    before = (logits > chosen) | ((logits == chosen) & (ids < tokens[:, None]))
    return norm, 1 + shards.total(count(before))
