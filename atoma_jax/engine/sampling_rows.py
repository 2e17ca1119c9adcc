"""The sampling settings of one row of a step, packed into int32 words: host encoding and device decoding.

Owns the order and meaning of the columns. Filling the per-step columns of a whole batch is `batch.py`'s job; the wide
per-slot settings (penalty counts, biases, masks, bad words) live in `sampler_state.py`.
"""

import enum
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from atoma_jax.sampling_params import SamplingParams


class Column(enum.IntEnum):
    """Index of a word in a row. Those from POSITION on change with every step, the others hold for a request's life."""

    SLOT = 0
    FLAGS = 1  # RowFlag
    TEMPERATURE = 2  # f32 bits, as all settings down to REPETITION but TOP_K
    TOP_K = 3  # 0: off
    TOP_P = 4
    MIN_P = 5
    PRESENCE = 6
    FREQUENCY = 7
    REPETITION = 8
    SEED_LOW = 9  # uint32 bits
    SEED_HIGH = 10
    SAMPLE_INDEX = 11  # which of a request's n samples
    NUM_LOGPROBS = 12  # wanted beside the chosen token's own
    POSITION = 13  # absolute position of the token that this row yields
    NUM_OUTPUTS = 14  # tokens that the sample has yielded before this one
    TARGET = 15  # the token to score, where SCORE is set


NUM_COLUMNS = len(Column)


class RowFlag(enum.IntFlag):
    """Which parts of the sampler a row takes. A row without any (padding, an unfinished prompt) yields nothing."""

    SAMPLE = 1  # yields a token and remembers it in its slot
    SCORE = 2  # scores TARGET, a token of the prompt, instead of yielding one
    LOGPROBS = 4  # wants logprob and rank
    PENALTIES = 8
    ADJUST = 16  # logit_bias, min_tokens
    MASK = 32  # allowed_token_ids
    BAD_WORDS = 64

    @property
    def needs_slot_row(self) -> bool:
        """Whether the slot's wide state must be written before the row's first step."""
        return bool(self & (RowFlag.PENALTIES | RowFlag.ADJUST | RowFlag.MASK | RowFlag.BAD_WORDS))


def setting_flags(params: SamplingParams) -> RowFlag:
    """The flags that follow from a request's settings; SAMPLE and SCORE are a step's choice."""
    flags = RowFlag(0)
    if params.logprobs is not None:
        flags |= RowFlag.LOGPROBS
    if params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1:
        flags |= RowFlag.PENALTIES
    if params.logit_bias or params.min_tokens > 0:
        flags |= RowFlag.ADJUST
    if params.allowed_token_ids is not None:
        flags |= RowFlag.MASK
    if params.bad_words:
        flags |= RowFlag.BAD_WORDS
    return flags


def encode(params: SamplingParams, *, slot: int, seed: int, sample_index: int = 0) -> np.ndarray:
    """Packs the settings of a row that samples, once a request.

    Args:
        params: the request's settings.
        slot: where the request's state lives on the device.
        seed: `params.seed`, or one drawn by the caller where the request has none; 64 bits, two's complement.
        sample_index: which of the request's n samples this row is.

    Returns:
        int32 [NUM_COLUMNS]; POSITION and NUM_OUTPUTS are 0, to be filled at each step.
    """
    row = np.zeros(NUM_COLUMNS, np.int32)
    floats = row.view(np.float32)
    words = row.view(np.uint32)
    row[Column.SLOT] = slot
    row[Column.FLAGS] = setting_flags(params) | RowFlag.SAMPLE
    floats[Column.TEMPERATURE] = 0.0 if params.greedy else params.temperature
    row[Column.TOP_K] = params.top_k
    floats[Column.TOP_P] = params.top_p
    floats[Column.MIN_P] = params.min_p
    floats[Column.PRESENCE] = params.presence_penalty
    floats[Column.FREQUENCY] = params.frequency_penalty
    floats[Column.REPETITION] = params.repetition_penalty
    words[Column.SEED_LOW] = seed & 0xFFFFFFFF
    words[Column.SEED_HIGH] = (seed >> 32) & 0xFFFFFFFF
    row[Column.SAMPLE_INDEX] = sample_index
    row[Column.NUM_LOGPROBS] = params.logprobs or 0
    return row


def encode_score(num_logprobs: int) -> np.ndarray:
    """Packs a row that scores a token of the prompt: int32 [NUM_COLUMNS]; TARGET is to be filled for each row."""
    row = np.zeros(NUM_COLUMNS, np.int32)
    row[Column.FLAGS] = RowFlag.SCORE | RowFlag.LOGPROBS
    row[Column.NUM_LOGPROBS] = num_logprobs
    return row


@no_type_check  # JAX also fills it with abstract values
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """The settings of B rows on the device; a flag is one boolean array."""

    slot: Int32[Array, " B"]
    sample: Bool[Array, " B"]
    score: Bool[Array, " B"]
    logprobs: Bool[Array, " B"]
    penalties: Bool[Array, " B"]
    adjust: Bool[Array, " B"]
    mask: Bool[Array, " B"]
    bad_words: Bool[Array, " B"]
    temperature: Float[Array, " B"]  # 0: greedy
    top_k: Int32[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    presence: Float[Array, " B"]
    frequency: Float[Array, " B"]
    repetition: Float[Array, " B"]
    seed: UInt32[Array, "B 2"]
    sample_index: Int32[Array, " B"]
    num_logprobs: Int32[Array, " B"]
    position: Int32[Array, " B"]
    num_outputs: Int32[Array, " B"]
    target: Int32[Array, " B"]


def decode_rows(words: Int32[Array, "B C"]) -> SamplingRows:
    """The device's view of rows packed by `encode` and `encode_score`."""
    assert words.shape[1] == NUM_COLUMNS
    flags = words[:, Column.FLAGS]

    def flag(which: RowFlag) -> Array:
        return (flags & int(which)) != 0

    def real(column: Column) -> Array:
        return lax.bitcast_convert_type(words[:, column], jnp.float32)

    return SamplingRows(
        slot=words[:, Column.SLOT],
        sample=flag(RowFlag.SAMPLE),
        score=flag(RowFlag.SCORE),
        logprobs=flag(RowFlag.LOGPROBS),
        penalties=flag(RowFlag.PENALTIES),
        adjust=flag(RowFlag.ADJUST),
        mask=flag(RowFlag.MASK),
        bad_words=flag(RowFlag.BAD_WORDS),
        temperature=real(Column.TEMPERATURE),
        top_k=words[:, Column.TOP_K],
        top_p=real(Column.TOP_P),
        min_p=real(Column.MIN_P),
        presence=real(Column.PRESENCE),
        frequency=real(Column.FREQUENCY),
        repetition=real(Column.REPETITION),
        seed=lax.bitcast_convert_type(words[:, Column.SEED_LOW : Column.SEED_HIGH + 1], jnp.uint32),
        sample_index=words[:, Column.SAMPLE_INDEX],
        num_logprobs=words[:, Column.NUM_LOGPROBS],
        position=words[:, Column.POSITION],
        num_outputs=words[:, Column.NUM_OUTPUTS],
        target=words[:, Column.TARGET],
    )
