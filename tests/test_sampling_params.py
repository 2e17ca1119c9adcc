"""Sampling parameters and prompts: what is accepted, what is refused, and in which words."""

import copy
import dataclasses
import math

import numpy as np
import pytest

from atoma_jax.errors import ParameterError, UserError
from atoma_jax.sampling_params import MAX_N, RequestOutputKind, SamplingParams, validate_prompt


def test_defaults_are_those_that_clients_of_other_engines_know():
    params = SamplingParams()
    assert dataclasses.asdict(params) == {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "detokenize": True,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "include_stop_str_in_output": False,
        "output_kind": RequestOutputKind.CUMULATIVE,
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words": (),
        "structured_outputs": None,
    }


def test_forms_are_made_one():
    params = SamplingParams(
        stop="END", stop_token_ids=[3, 3, 5], top_k=-1, seed=-1, logit_bias={7: 1}, allowed_token_ids=[np.int64(2)]
    )
    assert params.stop == ("END",)
    assert params.stop_token_ids == (3, 5)
    assert params.top_k == 0
    assert params.seed is None
    assert params.logit_bias == {7: 1.0}
    assert params.allowed_token_ids == (2,)


def test_greedy_is_a_temperature_below_1e_5():
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -0.5}, "temperature must be non-negative, got -0.5."),
        ({"temperature": 2.5}, "temperature must be in [0, 2], got 2.5."),
        ({"temperature": math.nan}, "temperature must be a finite number, got nan."),
        ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0."),
        ({"top_p": 1.5}, "top_p must be in (0, 1], got 1.5."),
        ({"top_p": math.nan}, "top_p must be in (0, 1], got nan."),
        ({"top_k": -2}, "top_k must be 0 (disable), or at least 1, got -2."),
        ({"min_p": -0.1}, "min_p must be in [0, 1], got -0.1."),
        ({"presence_penalty": 3.0}, "presence_penalty must be in [-2, 2], got 3.0."),
        ({"frequency_penalty": -math.inf}, "frequency_penalty must be in [-2, 2], got -inf."),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be greater than zero, got 0.0."),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0."),
        ({"n": 0}, "n must be at least 1, got 0."),
        ({"n": MAX_N + 1}, f"n must be at most {MAX_N}, got {MAX_N + 1}."),
        ({"min_tokens": -1}, "min_tokens must be greater than or equal to 0, got -1."),
        ({"min_tokens": 17}, "min_tokens must be less than or equal to max_tokens=16, got 17."),
        ({"stop": ["a", ""]}, "stop cannot contain an empty string."),
        (
            {"stop": "a", "detokenize": False},
            "stop strings are only supported when detokenize is True. Set detokenize=True to use stop.",
        ),
        ({"allowed_token_ids": []}, "allowed_token_ids is not None and empty!"),
        ({"logit_bias": {5: 101.0}}, "logit_bias[5] must be in [-100, 100], got 101.0."),
        ({"logit_bias": {5: math.nan}}, "logit_bias[5] must be in [-100, 100], got nan."),
    ],
)
def test_messages_are_the_ones_that_clients_match_on(given, message):
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**given)
    assert str(caught.value) == message
    assert isinstance(caught.value, UserError)


NUMBERS = ["presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p"]
HUGE = pytest.param(10**5000, id="huge")  # Python refuses to print it
INTEGERS = ["n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"]
FLAGS = [
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", [True, "7", None, [1], math.nan, math.inf, 1e999, pytest.param(10**400, id="huge"), 1j]
)
def test_what_is_no_finite_number_is_no_number(name, value):
    with pytest.raises(ParameterError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [True, "7", 1.0, math.nan, [1], -(10**24), HUGE])
def test_what_is_no_integer_of_a_sane_size_is_refused(name, value):
    if name == "top_k" and value is HUGE.values[0]:
        assert SamplingParams(top_k=value).top_k == 2**31 - 1  # more than any vocabulary: keeps everything
        return
    with pytest.raises(ParameterError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_flags_are_booleans(name, value):
    with pytest.raises(ParameterError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "given",
    [
        {"stop": [1]},
        {"stop": b"x"},
        {"stop": ["x" * 5000]},
        {"stop": [str(i) for i in range(1000)]},
        {"bad_words": "word"},
        {"bad_words": ["  "]},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": ["1"]},
        {"stop_token_ids": [10**24]},
        {"allowed_token_ids": [True]},
        {"logit_bias": [1, 2]},
        {"logit_bias": {"1": 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: True}},
        {"output_kind": 1},
        {"seed": 2**63},
        {"repetition_penalty": 1e-30},
    ],
)
def test_lists_and_maps_are_checked_to_their_last_entry(given):
    with pytest.raises(ParameterError, match=next(iter(given))):
        SamplingParams(**given)


@pytest.mark.parametrize(
    ("name", "value"),
    [("logprob_token_ids", [1]), ("flat_logprobs", True), ("extra_args", {})],
)
def test_what_is_not_implemented_is_refused_by_name(name, value):
    with pytest.raises(ParameterError, match=f"{name} is not supported"):
        SamplingParams(**{name: value})
    SamplingParams(**{name: False if name == "flat_logprobs" else None})


def test_ids_outside_the_vocabulary_are_refused():
    for given in ({"stop_token_ids": [97]}, {"logit_bias": {97: 1.0}}, {"allowed_token_ids": [1, 97]}):
        with pytest.raises(ParameterError, match=r"\[97\].*Vocabulary size: 97"):
            SamplingParams(**given).validate_for(vocab_size=97)
    SamplingParams(stop_token_ids=[96], logit_bias={0: 1.0}, allowed_token_ids=[96]).validate_for(vocab_size=97)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_logprobs_are_limited_by_the_engine(name):
    SamplingParams(**{name: 20}).validate_for(vocab_size=97)
    SamplingParams(**{name: -1}).validate_for(vocab_size=97, max_logprobs=97)
    for count in (21, -1):
        with pytest.raises(ParameterError, match=r"greater than max allowed: 20"):
            SamplingParams(**{name: count}).validate_for(vocab_size=97)


def test_params_are_immutable_and_a_changed_copy_is_checked():
    params = SamplingParams(stop="x", logit_bias={1: 2.0}, bad_words=["bad"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # pyright: ignore[reportAttributeAccessIssue]
    assert dataclasses.replace(params, n=2).n == 2
    with pytest.raises(ParameterError, match="n must be at least 1"):
        dataclasses.replace(params, n=0)
    assert copy.deepcopy(params) == params


def test_output_is_limited_by_max_tokens_and_by_the_model():
    assert SamplingParams(max_tokens=5).output_limit(prompt_len=90, max_model_len=100) == 5
    assert SamplingParams(max_tokens=50).output_limit(prompt_len=90, max_model_len=100) == 10
    assert SamplingParams(max_tokens=None).output_limit(prompt_len=90, max_model_len=100) == 10


def test_a_prompt_too_long_is_refused_in_the_words_of_other_engines():
    validate_prompt([1] * 9, vocab_size=97, max_model_len=10)
    with pytest.raises(ParameterError) as caught:
        validate_prompt([1] * 11, vocab_size=97, max_model_len=10)
    assert str(caught.value) == (
        "This model's maximum context length is 10 tokens. However, your prompt contains 11 input tokens, which "
        "exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
    )
    with pytest.raises(ParameterError, match="no room for an output token"):
        validate_prompt([1] * 10, vocab_size=97, max_model_len=10)


@pytest.mark.parametrize("ids", [[], [-1], [97], [10**24], [True], ["1"], [1.0]])
def test_a_prompt_of_anything_but_ids_of_the_vocabulary_is_refused(ids):
    with pytest.raises(ParameterError, match="prompt"):
        validate_prompt(ids, vocab_size=97, max_model_len=10)
