"""The host's side of the sampler's state: limits, sizes, and the tokens of bad words."""

import jax
import numpy as np
import pytest

from atoma_jax.engine.sampler_state import SamplerShape, SlotRules, bad_word_sequences, init_state, write_slot
from atoma_jax.engine.sampling_rows import NUM_COLUMNS, decode_rows, encode
from atoma_jax.errors import ParameterError
from atoma_jax.sampling_params import SamplingParams

SHAPE = SamplerShape(slots=3, vocab_size=97, max_model_len=300, max_adjusted=4, max_bad_words=2, max_bad_word_tokens=3)


def test_a_request_beyond_a_limit_is_refused_by_name():
    bias = dict.fromkeys(range(5), 1.0)
    with pytest.raises(ParameterError, match=r"logit_bias may name at most 4 token ids.*got 5"):
        SlotRules(SamplingParams(logit_bias=bias), shape=SHAPE)
    with pytest.raises(ParameterError, match="logit_bias may name at most 4"):
        SlotRules(SamplingParams(logit_bias={1: 1.0, 2: 1.0}, min_tokens=2), shape=SHAPE, stop_ids=(5, 6, 7))
    with pytest.raises(ParameterError, match=r"Too many bad words after tokenization: 3. The max number is 2"):
        SlotRules(SamplingParams(), shape=SHAPE, bad_words=[(1,), (2,), (3,)])
    with pytest.raises(ParameterError, match="at most 3 tokens, got one of 4"):
        SlotRules(SamplingParams(), shape=SHAPE, bad_words=[(1, 2, 3, 4)])


def test_stop_ids_take_no_place_without_min_tokens():
    SlotRules(SamplingParams(logit_bias={1: 1.0}), shape=SHAPE, stop_ids=range(50))


@pytest.mark.parametrize(
    ("length", "dtype"), [(255, np.uint8), (256, np.uint16), (65_535, np.uint16), (65_536, np.uint32)]
)
def test_counts_hold_the_longest_output(length, dtype):
    shape = SamplerShape(slots=1, vocab_size=5, max_model_len=length)
    assert shape.count_dtype == dtype
    row = SlotRules(SamplingParams(), shape=shape).slot_row([1], [3] * length)
    assert row.output_counts.tolist() == [0, 0, 0, length, 0]
    assert row.output_counts.dtype == init_state(shape).output_counts.dtype


def test_writing_a_slot_leaves_the_others():
    before = jax.tree.map(np.asarray, init_state(SHAPE))
    rules = SlotRules(SamplingParams(allowed_token_ids=[0, 33, 96]), shape=SHAPE, bad_words=[(4, 5)])
    state = jax.jit(write_slot)(init_state(SHAPE), 1, rules.slot_row([0, 31, 32], [7, 8, 9]))
    assert np.asarray(state.allowed_bits)[1].tolist() == [1, 2, 0, 1]
    assert np.asarray(state.prompt_bits)[1].tolist() == [1 | 1 << 31, 1, 0, 0]
    assert np.asarray(state.recent)[1].tolist() == [8, 9]
    for slot in (0, 2):
        jax.tree.map(lambda old, new, slot=slot: np.testing.assert_array_equal(old[slot], new[slot]), before, state)


def test_bad_words_are_spelled_at_the_start_and_after_a_space():
    vocabulary = {"bad": [10], " bad": [11], "worse": [20, 21], " worse": [22, 21], "two words": [1, 2, 3]}
    vocabulary[" two words"] = [4, 5]  # not as many tokens: as in vLLM, left out
    encoded = bad_word_sequences(["bad", " worse", "two words", "bad"], lambda text: vocabulary[text])
    assert encoded == [(10,), (11,), (20, 21), (22, 21), (1, 2, 3)]
    with pytest.raises(ParameterError, match="at least one token"):
        bad_word_sequences(["x"], lambda text: [])


def test_a_row_survives_its_packing():
    params = SamplingParams(
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.5,
        logprobs=3,
    )
    seed = -5
    words = encode(params, slot=2, seed=seed, sample_index=4)
    assert words.shape == (NUM_COLUMNS,)
    rows = jax.tree.map(lambda x: np.asarray(x)[0], jax.jit(decode_rows)(words[None]))
    assert (rows.slot, rows.top_k, rows.sample_index, rows.num_logprobs) == (2, 5, 4, 3)
    for name in ("temperature", "top_p", "min_p"):
        assert getattr(rows, name) == np.float32(getattr(params, name))
    assert (rows.presence, rows.frequency, rows.repetition) == (1.0, -1.0, 1.5)
    assert (int(rows.seed[1]) << 32) + int(rows.seed[0]) == seed % 2**64
    assert (rows.sample, rows.score, rows.logprobs, rows.penalties) == (True, False, True, True)
    assert (rows.adjust, rows.mask, rows.bad_words) == (False, False, False)
