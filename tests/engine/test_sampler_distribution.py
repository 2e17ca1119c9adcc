"""Drawn tokens follow the distribution that a float64 computation of the whole chain gives, setting by setting."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atoma_jax.engine.sampler import sample
from atoma_jax.engine.sampler_state import SamplerShape, SlotRules, init_state, write_slot
from atoma_jax.engine.sampling_rows import Column, RowFlag, decode_rows, encode
from atoma_jax.sampling_params import SamplingParams

V, B = 97, 8192  # draws at once: rows of one request at different positions
SHAPE = SamplerShape(slots=2, vocab_size=V, max_model_len=1000, max_adjusted=8, max_bad_words=4, max_bad_word_tokens=3)
PROMPT, OUTPUT = [3, 5, 5, 8], [5, 9, 9, 9]


@partial(jax.jit, static_argnames="native")
def sampled(logits, words, state, native):
    rows = decode_rows(words)
    return sample(jnp.broadcast_to(logits, (B, V)), rows, state, max_logprobs=0, native=native)[0]


CHOSEN = SimpleNamespace(native=False)  # by the fixture


@pytest.fixture(autouse=True)
def kernels(native_sampling, monkeypatch):
    monkeypatch.setattr(CHOSEN, "native", native_sampling)


def many(logits, words, state):
    return sampled(logits, words, state, native=CHOSEN.native)


put = jax.jit(write_slot)


def draws(logits, params):
    """Tokens of one request at B positions."""
    state = init_state(SHAPE)
    words = np.tile(encode(params, slot=1, seed=1234), (B, 1))
    words[:, Column.POSITION] = np.arange(B)
    words[:, Column.NUM_OUTPUTS] = len(OUTPUT)
    # All rows read slot 1: this is about what is drawn, and duplicate writes to a slot do no harm to reading it.
    if RowFlag(int(words[0, Column.FLAGS])).needs_slot_row:
        state = put(state, 1, SlotRules(params, shape=SHAPE, stop_ids=(2, 7)).slot_row(PROMPT, OUTPUT))
    out = many(np.asarray(logits, np.float32), words, state)
    assert bool(out.ok.all())
    return np.asarray(out.tokens)


def reference(logits, params):
    """Probabilities in float64, by sorting."""
    x = np.asarray(logits, np.float32).astype(np.float64)
    if params.allowed_token_ids is not None:
        x[np.setdiff1d(np.arange(V), params.allowed_token_ids)] = -np.inf
    for token, value in (params.logit_bias or {}).items():
        x[token] += value
    if len(OUTPUT) < params.min_tokens:
        x[[2, 7]] = -np.inf
    counts = np.bincount(OUTPUT, minlength=V)
    seen = (counts > 0) | (np.bincount(PROMPT, minlength=V) > 0)
    factor = np.where(seen, params.repetition_penalty, 1.0)
    x = np.where(x > 0, x / factor, x * factor)
    x = x - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    x = x / params.temperature
    kept = np.exp(x - x.max()) >= params.min_p
    if params.top_k:
        kept &= x >= np.sort(np.where(kept, x, -np.inf))[-min(params.top_k, V)]
    probs = np.where(kept, np.exp(x - x.max()), 0)
    probs /= probs.sum()
    if params.top_p < 1:
        order = np.argsort(-probs, kind="stable")
        last = order[np.searchsorted(np.cumsum(probs[order]), params.top_p)]
        probs = np.where(probs >= probs[last], probs, 0)
        probs /= probs.sum()
    return probs


def assert_follows(tokens, probs):
    """Chi-square over the tokens, those expected fewer than five times taken together; five sigmas."""
    counts = np.bincount(tokens, minlength=V)
    assert not np.any(counts[probs == 0]), "a token outside the filters was drawn"
    expected = probs * len(tokens)
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi, freedom = ((observed - wanted) ** 2 / wanted).sum(), max(1, len(wanted) - 1)
    assert chi < freedom + 5 * np.sqrt(2 * freedom) + 5


def some_logits(seed=0):
    return np.random.default_rng(seed).standard_normal(V).astype(np.float32) * 2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 500},
        {"top_p": 0.8},
        {"top_p": 1e-9},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.7, "min_p": 0.05, "temperature": 0.8},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.7},
        {"repetition_penalty": 1.8},
        {"presence_penalty": -1.0, "frequency_penalty": 0.5, "repetition_penalty": 0.6, "top_p": 0.9},
        {"logit_bias": {1: 3.0, 2: -100.0, 4: -1.0}},
        {"min_tokens": 5, "max_tokens": 9},
        {"min_tokens": 4, "max_tokens": 9},
        {"allowed_token_ids": [2, 3, 50, 96]},
        {"allowed_token_ids": list(range(40)), "logit_bias": {50: 100.0, 7: 2.0}, "min_tokens": 9, "top_k": 9},
    ],
    ids=str,
)
def test_every_setting_and_their_combinations(settings):
    params = SamplingParams(**settings)
    assert_follows(draws(some_logits(), params), reference(some_logits(), params))


def test_ties_at_the_border_of_top_k_and_top_p_are_kept():
    logits = np.round(some_logits())
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.3), SamplingParams(top_k=9, top_p=0.5)):
        probs = reference(logits, params)
        assert (probs > 0).sum() > params.top_k
        assert_follows(draws(logits, params), probs)


def test_a_flat_distribution_keeps_every_token():
    for params in (SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(top_k=3)):
        assert_follows(draws(np.zeros(V), params), np.full(V, 1 / V))


def test_barred_logits_are_never_drawn():
    logits = some_logits()
    logits[::2] = -np.inf
    assert_follows(draws(logits, SamplingParams()), reference(logits, SamplingParams()))
    logits[1:-2] = -np.inf
    assert set(draws(logits, SamplingParams())) == {95}


def test_samples_of_one_request_are_independent():
    """The same position of two samples, or of two seeds, does not draw the same number."""
    words = np.tile(encode(SamplingParams(), slot=0, seed=0), (B, 1))
    words[:, Column.SEED_LOW] = np.arange(B) // 32
    words[:, Column.SAMPLE_INDEX] = np.arange(B) % 32
    tokens = np.asarray(many(np.zeros(V, np.float32), words, init_state(SHAPE)).tokens)
    grid = tokens.reshape(-1, 32)
    for same in (grid[:, 0] == grid[:, 1], grid[0] == grid[1], grid[:-1, 5] == grid[1:, 5]):
        assert same.mean() < 0.06
    assert_follows(tokens, np.full(V, 1 / V))
