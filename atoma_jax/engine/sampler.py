"""One token a row, on the device, for every row of a step at once: settings are data, never branches of Python.

Owns the path from raw logits to tokens and what a step pays for: a step of greedy rows without rules takes one maximum
over the logits, and each further part only runs where a row asks for it. The parts: `logit_rules.py` (masks, biases,
penalties), `draw.py` (temperature, filters, randomness), `logprobs.py`.
"""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from atoma_jax.engine.draw import draw
from atoma_jax.engine.logit_rules import apply_rules
from atoma_jax.engine.logprobs import token_logprobs
from atoma_jax.engine.sampler_state import SamplerState, record_tokens
from atoma_jax.engine.sampling_rows import SamplingRows
from atoma_jax.engine.vocab_blocks import argmax, block_max
from atoma_jax.engine.vocab_shards import WHOLE, VocabShards


@no_type_check  # JAX also fills it with abstract values
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOutput:
    """What a step yields for each of its B rows. Logprobs are of the raw logits; zeros in rows that did not ask."""

    tokens: Int32[Array, " B"]  # of rows that score: their target; 0 in rows that are not ok or yield nothing
    ok: Bool[Array, " B"]  # False: the logits hold NaN or +inf, or the rules allow no token
    logprob: Float32[Array, " B"]
    rank: Int32[Array, " B"]  # 1 for the likeliest; of equal tokens the lower id comes first
    top_ids: Int32[Array, "B n"]  # by rank
    top_logprobs: Float32[Array, "B n"]


def sample(
    logits: Float32[Array, "B V"],
    rows: SamplingRows,
    state: SamplerState,
    *,
    max_logprobs: int,
    shards: VocabShards = WHOLE,
    native: bool = False,
) -> tuple[SampleOutput, SamplerState]:
    """Samples or scores one token a row and remembers the sampled ones in their slots.

    A row's token depends on its own logits, settings and slot alone: it is bit-equal in any batch and at any place.

    Args:
        logits: of the model, B rows.
        rows: their settings. Rows that sample have different slots.
        state: donated by the step.
        max_logprobs: how many of the likeliest tokens come back, at most V; static.
        shards: how the vocabulary is cut, of which `logits` holds this device's part; static.
        native: native kernels draw, and compute logprobs; static.
    """
    tops = block_max(logits)  # [B, N]
    raw_ok = _usable(logits, tops, shards)
    ruled = rows.mask | rows.bad_words | rows.adjust | rows.penalties
    random = rows.temperature > 0

    def pick(logits: Array, tops: Array) -> tuple[Array, Array]:
        top = shards.largest(jnp.max(tops, axis=1))
        ok = raw_ok & jnp.isfinite(top)
        drawn = ok & rows.sample & random
        greedy = argmax(logits, tops, shards)

        def mixed(logits: Array) -> Array:
            return jnp.where(drawn, draw(logits, top, rows, drawn, shards, native=native), greedy)

        return lax.cond(jnp.any(drawn), mixed, lambda _: greedy, logits), ok

    def choose(logits: Array, tops: Array, rows: SamplingRows, state: SamplerState) -> tuple[Array, Array]:
        def pick_ruled(logits: Array, _: Array) -> tuple[Array, Array]:
            logits = apply_rules(logits, rows, state, shards)
            return pick(logits, block_max(logits))

        if not native:
            return pick_ruled(logits, tops)
        # Picking compiles to little there, so it may be in a program twice: without rules nothing is copied.
        return lax.cond(jnp.any(rows.sample & ruled), pick_ruled, pick, logits, tops)

    def choose_plainly(logits: Array, tops: Array, *_: SamplingRows | SamplerState) -> tuple[Array, Array]:
        return argmax(logits, tops, shards), raw_ok

    special = jnp.any(rows.sample & (ruled | random))
    chosen, ok = lax.cond(special, choose, choose_plainly, logits, tops, rows, state)
    sampled = rows.sample & ok
    tokens = jnp.where(rows.score, rows.target, jnp.where(sampled, chosen, 0))
    state = record_tokens(
        state,
        slot=rows.slot,
        tokens=tokens,
        sampled=sampled,
        counted=sampled & rows.penalties,
        shards=shards,
    )
    found = token_logprobs(logits, tops, tokens, rows.logprobs, max_logprobs, shards, native=native)
    return SampleOutput(
        tokens=tokens,
        ok=ok,
        logprob=found.logprob,
        rank=found.rank,
        top_ids=found.top_ids,
        top_logprobs=found.top_logprobs,
    ), state


def score(
    logits: Float32[Array, "B V"],
    rows: SamplingRows,
    *,
    max_logprobs: int,
    shards: VocabShards = WHOLE,
    native: bool = False,
) -> SampleOutput:
    """Logprobs of each row's target. The program that only scores prompts pays for no sampling, and compiles faster.

    Args:
        logits: of the model, B rows.
        rows: their settings; all of them score.
        max_logprobs: how many of the likeliest tokens come back, at most V; static.
        shards: how the vocabulary is cut, of which `logits` holds this device's part; static.
        native: native kernels compute logprobs; static.
    """
    tops = block_max(logits)  # [B, N]
    found = token_logprobs(logits, tops, rows.target, rows.logprobs, max_logprobs, shards, native=native)
    return SampleOutput(
        tokens=rows.target,
        ok=_usable(logits, tops, shards),
        logprob=found.logprob,
        rank=found.rank,
        top_ids=found.top_ids,
        top_logprobs=found.top_logprobs,
    )


def _usable(logits: Array, tops: Array, shards: VocabShards) -> Bool[Array, " B"]:
    """Rows with a finite maximum and no NaN; -inf alone is a legal logit."""
    # The sum tells of a NaN, which XLA:CPU's maximum passes over.
    return jnp.isfinite(shards.largest(jnp.max(tops, axis=1))) & ~jnp.isnan(shards.total(jnp.sum(logits, axis=1)))
