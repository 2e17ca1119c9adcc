"""What a request's rules do to its logits before temperature: allowed ids, bad words, biases, min_tokens, penalties.

Owns the rules and their order, which is vLLM's. Rows whose flags do not ask for a rule pass through it unchanged, and
the work of a rule is only done in steps where a row asks for it.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, UInt32

from atoma_jax.engine.sampler_state import SamplerState
from atoma_jax.engine.sampling_rows import SamplingRows
from atoma_jax.engine.vocab_shards import WHOLE, VocabShards


def apply_rules(
    logits: Float32[Array, "B V"], rows: SamplingRows, state: SamplerState, shards: VocabShards = WHOLE
) -> Float32[Array, "B V"]:
    """The logits that greedy decoding takes the largest of."""
    for asked, rule in (
        (rows.mask, _allow),
        (rows.adjust | rows.bad_words, _adjust),
        (rows.penalties, _penalize),
    ):
        logits = lax.cond(jnp.any(asked), partial(rule, shards), lambda x, *_: x, logits, rows, state)
    return logits


def _unpack(words: UInt32[Array, "B M"], V: int, shards: VocabShards) -> Bool[Array, "B V"]:
    """Bits of this device's part of the vocabulary, V tokens; words are of all parts."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1  # [B, V/32, 32]
    flat = bits.reshape(words.shape[0], -1)
    if shards.count > 1:
        return lax.dynamic_slice_in_dim(flat, shards.first(V), V, axis=1) != 0
    return flat[:, :V] != 0


def _allow(shards: VocabShards, logits: Array, rows: SamplingRows, state: SamplerState) -> Array:
    allowed = _unpack(state.allowed_bits[rows.slot], logits.shape[1], shards)
    return jnp.where(rows.mask[:, None] & ~allowed, -jnp.inf, logits)


def _adjust(shards: VocabShards, logits: Array, rows: SamplingRows, state: SamplerState) -> Array:
    """Adds biases, and -inf to stop tokens before min_tokens and to the last token of a bad word already begun."""
    (B, V), W = logits.shape, state.recent.shape[1]
    before = jnp.arange(W) < W - state.bad_prefix_len[rows.slot][:, :, None]  # [B, N, W]: places before the prefix
    same = state.bad_prefix[rows.slot] == state.recent[rows.slot][:, None, :]
    begun = rows.bad_words[:, None] & jnp.all(before | same, axis=2)  # [B, N]
    valid = rows.adjust[:, None] & (rows.num_outputs[:, None] < state.adjust_until[rows.slot])  # [B, A]
    active = jnp.concatenate([begun, valid], axis=1)
    ids = jnp.concatenate([state.bad_last[rows.slot], state.adjust_ids[rows.slot]], axis=1)
    values = jnp.concatenate([jnp.full(begun.shape, -jnp.inf), state.adjust_values[rows.slot]], axis=1)
    if shards.count > 1:
        ids, _ = shards.own(ids, V)
    # V is past the end: dropped
    return logits.at[jnp.arange(B)[:, None], jnp.where(active, ids, V)].add(values, mode="drop")


def _penalize(shards: VocabShards, logits: Array, rows: SamplingRows, state: SamplerState) -> Array:
    """Repetition over prompt and output (arXiv:1909.05858), then frequency and presence over the output (OpenAI)."""
    counts = state.output_counts[rows.slot].astype(jnp.float32)  # [B, V]
    in_output = counts > 0
    in_text = in_output | _unpack(state.prompt_bits[rows.slot], logits.shape[1], shards)
    repetition = jnp.where(in_text, rows.repetition[:, None], 1.0)
    x = jnp.where(logits > 0, logits / repetition, logits * repetition)
    x = x - rows.frequency[:, None] * counts
    x = x - jnp.where(in_output, rows.presence[:, None], 0.0)
    return jnp.where(rows.penalties[:, None], x, logits)
