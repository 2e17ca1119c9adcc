"""One sampling step: rows do not see each other, rules do what they say, logprobs are the model's own."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atoma_jax.engine.sampler import sample
from atoma_jax.engine.sampler_state import SamplerShape, SlotRules, init_state, write_slot
from atoma_jax.engine.sampling_rows import (
    NUM_COLUMNS,
    Column,
    RowFlag,
    decode_rows,
    encode,
    encode_score,
    setting_flags,
)
from atoma_jax.sampling_params import SamplingParams

pytestmark = pytest.mark.optimized  # bits are compared

V, S, B = 1024, 16, 16
TOP = 20
SHAPE = SamplerShape(slots=S, vocab_size=V, max_model_len=300, max_adjusted=8, max_bad_words=4, max_bad_word_tokens=4)
PROMPT, OUTPUT = [3, 5, 5, 8], [5, 9, 9, 9]
STOPS = (2, 7)

# One of each kind, as neighbours and one by one.
MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=0.7, top_k=40, top_p=0.9, logprobs=5),
    SamplingParams(seed=3, top_p=0.5, min_p=0.01, presence_penalty=1.0, frequency_penalty=0.2),
    SamplingParams(seed=4, logit_bias={9: 4.0, 100: 2.0}, min_tokens=8, allowed_token_ids=list(range(500))),
    SamplingParams(temperature=0, repetition_penalty=1.3, logprobs=0),
    SamplingParams(seed=6, top_k=600, top_p=0.99, temperature=2.0),
    SamplingParams(seed=7, bad_words=["x"], temperature=0.3),
] * 2
BAD_WORDS = [(9, 9, 11), (4,)]


@partial(jax.jit, donate_argnums=2, static_argnames="native")
def sampled(logits, words, state, native):
    return sample(logits, decode_rows(words), state, max_logprobs=TOP, native=native)


CHOSEN = SimpleNamespace(native=False)  # by the fixture


@pytest.fixture(autouse=True)
def kernels(native_sampling, monkeypatch):
    monkeypatch.setattr(CHOSEN, "native", native_sampling)


def step(logits, words, state):
    return sampled(logits, words, state, native=CHOSEN.native)


put = jax.jit(write_slot, donate_argnums=0)


def rules_of(params, **given):
    return SlotRules(params, shape=SHAPE, stop_ids=STOPS, bad_words=BAD_WORDS if params.bad_words else (), **given)


def words_of(params, *, slot, position=40, outputs=OUTPUT):
    words = encode(params, slot=slot, seed=params.seed or 0)
    words[Column.POSITION] = position
    words[Column.NUM_OUTPUTS] = len(outputs)
    return words


def run(requests, logits, *, rows=B):
    """One step of requests [(params, slot)], one a row, padded to `rows`; what comes back of the requests' rows."""
    state = init_state(SHAPE)
    words = np.zeros((rows, NUM_COLUMNS), np.int32)
    padded = np.zeros((rows, V), np.float32)
    padded[: len(requests)] = logits
    for row, (params, slot) in enumerate(requests):
        words[row] = words_of(params, slot=slot)
        if setting_flags(params).needs_slot_row:
            state = put(state, slot, rules_of(params).slot_row(PROMPT, OUTPUT))
    out, state = step(padded, words, state)
    return jax.tree.map(lambda x: np.asarray(x)[: len(requests)], out), state


def some_logits(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, V)).astype(np.float32) * 3


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_a_row_is_bit_equal_alone_at_any_place_in_any_slot_and_batch():
    logits = some_logits(B)
    together, _ = run([(params, slot) for slot, params in enumerate(MIXED)], logits)
    order = np.random.default_rng(1).permutation(B)
    shuffled, _ = run([(MIXED[i], S - 1 - int(i)) for i in order], logits[order])
    assert_equal(shuffled, at(order, together))
    for row, params in enumerate(MIXED):
        alone, _ = run([(params, 9)], logits[row : row + 1], rows=1)
        assert_equal(alone, at(np.s_[row : row + 1], together))


def test_a_token_depends_on_seed_position_and_sample_index():
    """The inverse of the test above: each of the three changes what is drawn."""
    base = words_of(SamplingParams(seed=1), slot=0)
    words = np.tile(base, (B, 1))
    words[2, Column.SEED_LOW] += 1
    words[3, Column.SEED_HIGH] += 1
    words[4, Column.POSITION] += 1
    words[5, Column.SAMPLE_INDEX] += 1
    words[6, Column.SLOT] += 1
    words[7, Column.NUM_OUTPUTS] += 1
    tokens = np.asarray(step(np.zeros((B, V), np.float32), words, init_state(SHAPE))[0].tokens).tolist()
    assert tokens[0] == tokens[1] == tokens[6] == tokens[7] == tokens[8]
    assert len(set(tokens)) == 5


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_damaged_row_fails_alone(poison):
    logits = some_logits(B)
    requests = [(params, slot) for slot, params in enumerate(MIXED)]
    clean, clean_state = run(requests, logits)
    for row in range(len(MIXED) // 2):
        damaged = logits.copy()
        damaged[row, 700] = poison
        out, state = run(requests, damaged)
        others = np.arange(B) != row
        assert not out.ok[row]
        assert out.tokens[row] == 0
        assert_equal(at(others, out), at(others, clean))
        assert int(state.last_token[row]) == 0
        slots = np.arange(S) != row
        assert_equal(at(slots, state), at(slots, clean_state))


def test_a_row_whose_rules_allow_nothing_fails():
    logits = some_logits(1)
    logits[0, 17] = -np.inf
    for params in (
        SamplingParams(allowed_token_ids=[17]),
        SamplingParams(allowed_token_ids=[2, 7], min_tokens=8, temperature=0),
    ):
        out, _ = run([(params, 3)], logits)
        assert not out.ok[0]
    assert run([(SamplingParams(), 3)], logits)[0].ok[0]


def test_padding_and_unfinished_prompts_yield_nothing_and_touch_no_slot():
    state = init_state(SHAPE)
    words = np.zeros((B, NUM_COLUMNS), np.int32)  # flags 0, slot 0
    words[3] = words_of(SamplingParams(temperature=0), slot=5)
    logits = some_logits(B)
    out, state = step(logits, words, state)
    np.testing.assert_array_equal(np.asarray(out.tokens), np.where(np.arange(B) == 3, logits.argmax(1), 0))
    assert np.flatnonzero(np.asarray(state.last_token)).tolist() == [5]
    assert np.flatnonzero((np.asarray(state.recent) != V).any(1)).tolist() == [5]


def at(index, tree):
    return jax.tree.map(lambda x: np.asarray(x)[index], tree)


def log_softmax(logits):
    x = logits.astype(np.float64)
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def test_logprobs_are_of_the_raw_logits_whatever_is_done_to_them():
    logits = np.round(some_logits(B), 1)  # with ties
    params = [
        SamplingParams(temperature=0, logprobs=20),
        SamplingParams(seed=1, temperature=2.0, logprobs=20),
        SamplingParams(temperature=0, logprobs=20, logit_bias={77: 100.0}),
        SamplingParams(temperature=0, logprobs=20, repetition_penalty=2.0, presence_penalty=2.0),
        SamplingParams(seed=1, logprobs=20, allowed_token_ids=[900, 901]),
        SamplingParams(temperature=0, logprobs=1),
    ]
    out, _ = run([(p, i) for i, p in enumerate(params)], logits[: len(params)])
    expected = log_softmax(logits[: len(params)])
    order = np.argsort(-logits[: len(params)], axis=1, kind="stable")
    rows = np.arange(len(params))
    assert out.tokens[2] == 77
    np.testing.assert_allclose(out.logprob, expected[rows, out.tokens], atol=2e-6)
    np.testing.assert_array_equal(out.rank, 1 + np.argmax(order == out.tokens[:, None], axis=1))
    np.testing.assert_array_equal(out.top_ids, order[:, :TOP])
    np.testing.assert_allclose(out.top_logprobs, np.take_along_axis(expected, order[:, :TOP], 1), atol=2e-6)
    chosen_is_top = out.rank <= TOP
    same = out.top_logprobs[rows[chosen_is_top], out.rank[chosen_is_top] - 1]
    np.testing.assert_array_equal(same, out.logprob[chosen_is_top])  # one value wherever a client finds it


def test_rows_that_score_give_the_logprob_of_their_target():
    logits = some_logits(B)
    targets = np.array([0, 5, 1023, 17, 17, 3, 600, 700] * 2)
    words = np.tile(encode_score(3), (B, 1))
    words[:, Column.TARGET] = targets
    out, state = step(logits, words, init_state(SHAPE))
    expected = log_softmax(logits)
    np.testing.assert_array_equal(out.tokens, targets)
    np.testing.assert_allclose(out.logprob, expected[np.arange(B), targets], atol=2e-6)
    np.testing.assert_array_equal(out.rank, 1 + (logits > logits[np.arange(B), targets][:, None]).sum(1))
    np.testing.assert_array_equal(out.top_ids[:, 0], logits.argmax(1))
    assert_equal(state, init_state(SHAPE))  # nothing was sampled


def test_an_impossible_target_scores_minus_infinity():
    logits = some_logits(B)
    logits[0, 5] = -np.inf
    words = np.tile(encode_score(1), (B, 1))
    words[:, Column.TARGET] = 5
    out, _ = step(logits, words, init_state(SHAPE))
    assert np.asarray(out.ok).all()
    assert np.asarray(out.logprob)[0] == -np.inf


def test_min_tokens_bars_stop_tokens_until_then():
    logits = some_logits(B)
    logits[:, 7] = 50.0
    params = SamplingParams(temperature=0, min_tokens=3)
    state = put(init_state(SHAPE), 0, rules_of(params).slot_row(PROMPT))
    for outputs in range(5):
        words = np.zeros((B, NUM_COLUMNS), np.int32)
        words[0] = words_of(params, slot=0, outputs=range(outputs))
        out, state = step(logits, words, state)
        assert (int(out.tokens[0]) == 7) == (outputs >= 3)


def test_bad_words_of_one_to_four_tokens_never_end():
    """Greedy: the token that would end a bad word gives way to the next best, nothing else changes."""
    bad = [(30,), (10, 11), (20, 21, 22), (40, 41, 42, 43)]
    params = SamplingParams(temperature=0, bad_words=["any"])
    rules = SlotRules(params, shape=SHAPE, bad_words=bad)
    assert_greedy_path(rules, params, favourites=[1, 30, 10, 11, 20, 21, 22, 11, 40, 41, 42, 43, 21, 22], bad=bad)
    assert_greedy_path(rules, params, favourites=[11, 10, 10, 11, 20, 20, 21, 22, 22, 41, 42, 43], bad=bad)


def assert_greedy_path(rules, params, *, favourites, bad):
    state = put(init_state(SHAPE), 4, rules.slot_row([*PROMPT, 10]))  # a prompt does not begin a bad word
    outputs = []
    for favourite in favourites:
        logits = np.zeros((B, V), np.float32)
        logits[0, favourite], logits[0, 999] = 9.0, 5.0
        words = np.zeros((B, NUM_COLUMNS), np.int32)
        words[0] = words_of(params, slot=4, outputs=outputs)
        out, state = step(logits, words, state)
        ends = any(tuple([*outputs, favourite][-len(word) :]) == word for word in bad)
        outputs.append(999 if ends else favourite)
        assert int(out.tokens[0]) == outputs[-1], outputs


@pytest.mark.parametrize("preempted_at", [None, 1, 7, 19])
def test_penalties_follow_the_output_and_survive_preemption(preempted_at):
    """20 greedy steps against counts recomputed on the host; a preempted request goes on in another slot."""
    params = SamplingParams(temperature=0, presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.5)
    rules = rules_of(params)
    logits = some_logits(20, seed=3)
    logits[:, 5:12] += 8  # a few favourites that penalties push down in turn
    slot, outputs = 2, []
    state = put(init_state(SHAPE), slot, rules.slot_row(PROMPT))
    for i in range(20):
        if i == preempted_at:
            slot = 11
            state = put(state, slot, rules.slot_row(PROMPT, outputs))
        words = np.zeros((B, NUM_COLUMNS), np.int32)
        words[1] = words_of(params, slot=slot, outputs=outputs)
        out, state = step(np.tile(logits[i], (B, 1)), words, state)
        counts = np.bincount(outputs, minlength=V)
        x = logits[i].astype(np.float64)
        seen = (counts > 0) | (np.bincount(PROMPT, minlength=V) > 0)
        x = np.where(seen, np.where(x > 0, x / 1.5, x * 1.5), x) - 0.4 * counts - 0.7 * (counts > 0)
        outputs.append(int(out.tokens[1]))
        assert outputs[-1] == int(np.argmax(x))
    assert len(set(outputs)) > 4
    np.testing.assert_array_equal(np.asarray(state.output_counts)[slot], np.bincount(outputs, minlength=V))


def test_a_slot_with_old_rules_does_not_touch_a_request_without():
    logits = some_logits(B)
    heavy = SamplingParams(allowed_token_ids=[1], logit_bias={2: 50.0}, presence_penalty=2.0, bad_words=["x"])
    state = put(init_state(SHAPE), 3, rules_of(heavy).slot_row(PROMPT, OUTPUT))
    words = np.zeros((B, NUM_COLUMNS), np.int32)
    words[0] = words_of(SamplingParams(temperature=0), slot=3)
    out, _ = step(logits, words, state)
    assert int(out.tokens[0]) == int(logits[0].argmax())


def test_a_vocabulary_of_49152_draws_what_it_draws_alone(native_sampling):
    """Through the candidates (peaked row), through all tokens (flat row), greedy and damaged neighbours between."""
    wide, rows = 49_152, 4
    shape = SamplerShape(slots=rows, vocab_size=wide, max_model_len=10, max_adjusted=1, max_bad_words=1)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((rows, wide)).astype(np.float32)
    logits[0] -= 3 * np.log(rng.permutation(wide) + 1)
    logits[3, 5] = np.nan
    params = [
        SamplingParams(seed=1, top_p=0.9, top_k=50),
        SamplingParams(seed=2, top_p=0.9),
        SamplingParams(temperature=0, logprobs=20),
        SamplingParams(seed=4),
    ]
    words = np.stack([encode(p, slot=i, seed=i) for i, p in enumerate(params)])
    run_wide = jax.jit(lambda x, w, s: sample(x, decode_rows(w), s, max_logprobs=TOP, native=native_sampling)[0])
    state = init_state(shape)
    kept = [set(np.argsort(-logits[0])[:50]), set(np.argsort(-logits[1])[: int(0.85 * wide)])]
    drawn = [[], []]
    for position in range(60):
        words[:, Column.POSITION] = position
        out = run_wide(jnp.asarray(logits), jnp.asarray(words), state)
        assert np.asarray(out.ok).tolist() == [True, True, True, False]
        assert int(out.tokens[2]) == int(np.argmax(logits[2]))
        for row in (0, 1):
            assert int(out.tokens[row]) in kept[row]
            drawn[row].append(int(out.tokens[row]))
    np.testing.assert_array_equal(np.asarray(out.top_ids)[2], np.argsort(-logits[2], kind="stable")[:TOP])
    words[1:, Column.FLAGS] = 0  # the first row alone now ends in the candidates
    for position in range(60):
        words[:, Column.POSITION] = position
        alone = run_wide(jnp.asarray(logits), jnp.asarray(words), state)
        assert int(alone.tokens[0]) == drawn[0][position]


def test_flags_say_which_parts_a_request_takes():
    assert setting_flags(SamplingParams()) == RowFlag(0)
    assert setting_flags(SamplingParams(logprobs=0)) == RowFlag.LOGPROBS
    assert not RowFlag.LOGPROBS.needs_slot_row
    for given in (
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 1.0}},
        {"min_tokens": 1},
        {"allowed_token_ids": [1]},
        {"bad_words": ["x"]},
    ):
        assert setting_flags(SamplingParams(**given)).needs_slot_row
