"""What the sampler remembers of each slot on the device, and how the host writes a slot when a request takes it.

Owns the arrays, their limits and the host's side of them: counts, biases, masks and bad words of a request as one
`SlotRow`. What they do to logits is `logit_rules.py`; which rows read them is said by `RowFlag`.

Every step updates `last_token`, `recent` and `output_counts` of the rows that sample. The wide parts are only read by
rows whose flags ask for them, so a request without such settings may take a slot without `write_slot`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from atoma_jax.engine.vocab_shards import WHOLE, VocabShards
from atoma_jax.errors import ParameterError
from atoma_jax.sampling_params import MAX_COUNT, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerShape:
    """Sizes of the sampler's state, fixed for an engine's life. A slot takes about V·(bytes of a count) + V/4 bytes."""

    slots: int
    vocab_size: int
    max_model_len: int  # bounds a token's count, and so its dtype
    max_adjusted: int = 512  # ids in logit_bias plus stop ids under min_tokens, a request
    max_bad_words: int = 128  # token sequences that bad_words become, a request
    max_bad_word_tokens: int = 8

    @property
    def count_dtype(self) -> np.dtype:
        """The narrowest unsigned type that no token's count can overflow."""
        return np.min_scalar_type(self.max_model_len)

    @property
    def mask_words(self) -> int:
        """uint32 words of a bit for each token of the vocabulary."""
        return -(-self.vocab_size // 32)


@no_type_check  # JAX also fills it with abstract values
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerState:
    """Per-slot state: S slots, V vocabulary, M words of 32 tokens. The id V stands for "no token" in empty places."""

    last_token: Int32[Array, " S"]
    recent: Int32[Array, "S W"]  # the last W output tokens, newest last
    output_counts: Array  # unsigned [S, V]: how often each token is in the output
    prompt_bits: UInt32[Array, "S M"]  # tokens of the prompt, bit i of word w is token 32·w + i
    allowed_bits: UInt32[Array, "S M"]
    adjust_ids: Int32[Array, "S A"]
    adjust_values: Float32[Array, "S A"]  # added to the logit
    adjust_until: Int32[Array, "S A"]  # while fewer tokens than this have been yielded
    bad_prefix: Int32[Array, "S N W"]  # all tokens of a bad word but its last, aligned to the right
    bad_prefix_len: Int32[Array, "S N"]
    bad_last: Int32[Array, "S N"]


@no_type_check  # JAX also fills it with abstract values
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRow:
    """What one slot holds while a request has it: a row of each of `SamplerState`'s arrays but `last_token`."""

    recent: Int32[np.ndarray, " W"]
    output_counts: np.ndarray
    prompt_bits: UInt32[np.ndarray, " M"]
    allowed_bits: UInt32[np.ndarray, " M"]
    adjust_ids: Int32[np.ndarray, " A"]
    adjust_values: Float32[np.ndarray, " A"]
    adjust_until: Int32[np.ndarray, " A"]
    bad_prefix: Int32[np.ndarray, "N W"]
    bad_prefix_len: Int32[np.ndarray, " N"]
    bad_last: Int32[np.ndarray, " N"]


def init_state(shape: SamplerShape) -> SamplerState:
    """A state whose slots are all empty; wide parts hold nothing that a row may read before `write_slot`."""
    S, V, W, N = shape.slots, shape.vocab_size, shape.max_bad_word_tokens - 1, shape.max_bad_words
    return SamplerState(
        last_token=jnp.zeros(S, jnp.int32),
        recent=jnp.full((S, W), V, jnp.int32),
        output_counts=jnp.zeros((S, V), shape.count_dtype),
        prompt_bits=jnp.zeros((S, shape.mask_words), jnp.uint32),
        allowed_bits=jnp.zeros((S, shape.mask_words), jnp.uint32),
        adjust_ids=jnp.full((S, shape.max_adjusted), V, jnp.int32),
        adjust_values=jnp.zeros((S, shape.max_adjusted), jnp.float32),
        adjust_until=jnp.zeros((S, shape.max_adjusted), jnp.int32),
        bad_prefix=jnp.full((S, N, W), V, jnp.int32),
        bad_prefix_len=jnp.zeros((S, N), jnp.int32),
        bad_last=jnp.full((S, N), V, jnp.int32),
    )


def write_slot(state: SamplerState, slot: Int32[Array, ""], row: SlotRow) -> SamplerState:
    """Puts a request's row into a slot. To be jitted with `state` donated; called when a request whose flags say
    `needs_slot_row` takes the slot, the first time or after preemption."""

    def put(old: Array, new: np.ndarray | Array) -> Array:
        return old.at[slot].set(new)

    return replace(
        state,
        recent=put(state.recent, row.recent),
        output_counts=put(state.output_counts, row.output_counts),
        prompt_bits=put(state.prompt_bits, row.prompt_bits),
        allowed_bits=put(state.allowed_bits, row.allowed_bits),
        adjust_ids=put(state.adjust_ids, row.adjust_ids),
        adjust_values=put(state.adjust_values, row.adjust_values),
        adjust_until=put(state.adjust_until, row.adjust_until),
        bad_prefix=put(state.bad_prefix, row.bad_prefix),
        bad_prefix_len=put(state.bad_prefix_len, row.bad_prefix_len),
        bad_last=put(state.bad_last, row.bad_last),
    )


def write_allowed(
    state: SamplerState, slots: Int32[Array, " n"], bits: Int32[Array | np.ndarray, "n M"]
) -> SamplerState:
    """Replaces the allowed tokens of n slots. To be jitted with `state` donated; places of `slots` past the end are
    dropped."""
    words = jax.lax.bitcast_convert_type(bits, jnp.uint32)
    return replace(state, allowed_bits=state.allowed_bits.at[slots].set(words, mode="drop"))


def record_tokens(
    state: SamplerState,
    *,
    slot: Int32[Array, " B"],
    tokens: Int32[Array, " B"],
    sampled: Bool[Array, " B"],
    counted: Bool[Array, " B"],
    shards: VocabShards = WHOLE,
) -> SamplerState:
    """Remembers the step's tokens.

    Args:
        state: of which three small rows a slot are updated in place where it is donated.
        slot: of each row; the rows that sampled have different ones.
        tokens: of each row.
        sampled: rows that yielded a token.
        counted: those among them whose request has penalties.
        shards: how the vocabulary is cut, of which `output_counts` holds this device's part.
    """
    nowhere = state.last_token.shape[0]  # past the end: dropped, where −1 would write the last slot
    at = jnp.where(sampled, slot, nowhere)
    recent = jnp.concatenate([state.recent[slot, 1:], tokens[:, None]], axis=1)  # [B, W]
    one = jnp.ones((), state.output_counts.dtype)
    place = tokens if shards.count == 1 else shards.own(tokens, state.output_counts.shape[1])[0]
    return replace(
        state,
        last_token=state.last_token.at[at].set(tokens, mode="drop"),
        recent=state.recent.at[at].set(recent, mode="drop"),
        output_counts=state.output_counts.at[jnp.where(counted, slot, nowhere), place].add(one, mode="drop"),
    )


def empty_row(shape: SamplerShape) -> SlotRow:
    """A row that asks for nothing; what `write_slot` is compiled from."""
    return SlotRules(SamplingParams(), shape=shape).slot_row(())


class SlotRules:
    """One request's settings in the device's form; built once, so that a request beyond a limit is refused early."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        shape: SamplerShape,
        stop_ids: Sequence[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
    ):
        """Lays out biases, masks and bad words.

        Args:
            params: validated for the vocabulary.
            shape: the engine's limits.
            stop_ids: every token that may end the output, end-of-sequence among them: barred until `min_tokens`.
            bad_words: what `bad_word_sequences` made of `params.bad_words`.

        Raises:
            ParameterError: the request needs more places than `shape` has.
        """
        self._shape = shape
        self._adjust = _adjustments(params, shape, stop_ids if params.min_tokens else ())
        self._bad_words = _bad_word_table(bad_words, shape)
        allowed = range(shape.vocab_size) if params.allowed_token_ids is None else params.allowed_token_ids
        self._allowed_bits = _bits(np.asarray(allowed, np.int64), shape)

    def slot_row(self, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()) -> SlotRow:
        """The slot's row after `prompt_ids` and, for a request that was preempted, all outputs it has yielded."""
        shape = self._shape
        width = shape.max_bad_word_tokens - 1
        recent = np.full(width, shape.vocab_size, np.int32)
        newest = np.asarray(output_ids, np.int32)[-width:]
        recent[width - len(newest) :] = newest
        counts = np.bincount(np.asarray(output_ids, np.int64), minlength=shape.vocab_size)
        ids, values, until = self._adjust
        prefix, prefix_len, last = self._bad_words
        return SlotRow(
            recent=recent,
            output_counts=counts.astype(shape.count_dtype),
            prompt_bits=_bits(np.asarray(prompt_ids, np.int64), shape),
            allowed_bits=self._allowed_bits,
            adjust_ids=ids,
            adjust_values=values,
            adjust_until=until,
            bad_prefix=prefix,
            bad_prefix_len=prefix_len,
            bad_last=last,
        )


def bad_word_sequences(words: Sequence[str], encode: Callable[[str], Sequence[int]]) -> list[tuple[int, ...]]:
    """The token sequences that spell bad words, at the start of a text and after a space.

    As vLLM does: the spaced form counts where it starts with another token and has as many tokens.

    Args:
        words: `SamplingParams.bad_words`.
        encode: text to token ids without special tokens.

    Raises:
        ParameterError: a word has no tokens.
    """
    sequences: list[tuple[int, ...]] = []
    for word in words:
        bare = tuple(encode(word.lstrip()))
        if not bare:
            raise ParameterError("bad_words", word, f"bad_words entries must tokenize to at least one token: {word!r}.")
        sequences.append(bare)
        spaced = tuple(encode(" " + word.lstrip()))
        if spaced and spaced[0] != bare[0] and len(spaced) == len(bare):
            sequences.append(spaced)
    return list(dict.fromkeys(sequences))


def _adjustments(
    params: SamplingParams, shape: SamplerShape, barred: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    entries = [(token, value, MAX_COUNT) for token, value in (params.logit_bias or {}).items()]
    entries += [(token, -np.inf, params.min_tokens) for token in dict.fromkeys(barred)]
    if len(entries) > shape.max_adjusted:
        raise ParameterError(
            "logit_bias",
            len(entries),
            f"logit_bias may name at most {shape.max_adjusted} token ids, stop tokens under min_tokens included, "
            f"got {len(entries)}.",
        )
    ids = np.full(shape.max_adjusted, shape.vocab_size, np.int32)
    values = np.zeros(shape.max_adjusted, np.float32)
    until = np.zeros(shape.max_adjusted, np.int32)
    for place, (token, value, last) in enumerate(entries):
        ids[place], values[place], until[place] = token, value, last
    return ids, values, until


def _bad_word_table(
    sequences: Sequence[Sequence[int]], shape: SamplerShape
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    limit, longest = shape.max_bad_words, shape.max_bad_word_tokens
    if len(sequences) > limit:
        raise ParameterError(
            "bad_words",
            len(sequences),
            f"Too many bad words after tokenization: {len(sequences)}. The max number is {limit}.",
        )
    width = longest - 1
    prefix = np.full((limit, width), shape.vocab_size, np.int32)
    prefix_len = np.zeros(limit, np.int32)
    last = np.full(limit, shape.vocab_size, np.int32)
    for place, sequence in enumerate(sequences):
        if len(sequence) > longest:
            raise ParameterError(
                "bad_words",
                len(sequence),
                f"bad_words entries may have at most {longest} tokens, got one of {len(sequence)}.",
            )
        prefix_len[place] = len(sequence) - 1
        prefix[place, width - prefix_len[place] :] = sequence[:-1]
        last[place] = sequence[-1]
    return prefix, prefix_len, last


def _bits(ids: np.ndarray, shape: SamplerShape) -> np.ndarray:
    """uint32 [V/32] with the bits of `ids` set."""
    flags = np.zeros(shape.mask_words * 32, np.bool_)
    flags[ids] = True
    return np.packbits(flags, bitorder="little").view("<u4").astype(np.uint32)
