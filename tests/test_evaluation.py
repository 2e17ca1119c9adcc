"""Perplexity against float64 numpy on made-up scores, and the windows that a long text is cut into."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from atoma_jax import SamplingParams
from atoma_jax.errors import ParameterError
from atoma_jax.evaluation import Perplexity, score, split_special, windows
from atoma_jax.outputs import CompletionOutput, Logprob, PositionLogprobs, RequestOutput

BOS = 1


class ScoringFake:
    """Scores token i behind token j with a table, so a wrong alignment gives a wrong number."""

    def __init__(self, vocab_size: int):
        logits = np.random.default_rng(0).normal(0, 2, (vocab_size, vocab_size))
        self.table = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))  # [V, V] float64
        self.prompts: list[list[int]] = []

    def generate(
        self,
        prompts: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        assert sampling_params is not None
        assert (sampling_params.prompt_logprobs, sampling_params.max_tokens) == (0, 1)
        assert isinstance(prompts, list)
        return [self._output(prompt["prompt_token_ids"]) for prompt in prompts]

    def _output(self, ids: list[int]) -> RequestOutput:
        self.prompts.append(ids)
        scores: list[PositionLogprobs | None] = [None]
        scores += [{token: Logprob(float(self.table[before, token]))} for before, token in itertools.pairwise(ids)]
        return RequestOutput(
            request_id="r",
            prompt=None,
            prompt_token_ids=ids,
            prompt_logprobs=scores,
            outputs=[CompletionOutput(index=0, text="", token_ids=[0])],
            finished=True,
        )


def tokens_of(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(2, 50, count).tolist()


@pytest.mark.parametrize(("context", "stride"), [(200, 100), (64, 63), (64, 1), (64, 32), (2, 1)])
@pytest.mark.parametrize("before", [[], [BOS]])
def test_every_token_counts_once_whatever_the_windows(context: int, stride: int, before: list[int]) -> None:
    fake, ids = ScoringFake(50), tokens_of(150)
    context += len(before)
    progress: list[int] = []
    result = score(fake, ids, before=before, context=context, stride=stride, on_window=progress.append)
    chain = [*before, *ids]
    expected = [-fake.table[a, b] for a, b in itertools.pairwise(chain)]
    np.testing.assert_allclose(result.nll, expected, rtol=0, atol=1e-12)
    assert list(result.token_ids) == chain[1:]
    assert result.mean_nll == pytest.approx(np.mean(expected), abs=1e-12)
    assert result.perplexity == pytest.approx(np.exp(np.mean(expected)))
    assert result.standard_error == pytest.approx(np.std(expected, ddof=1) / math.sqrt(len(expected)))
    assert sum(progress) == len(expected)
    assert all(len(prompt) <= context and prompt[: len(before)] == before for prompt in fake.prompts)


@hypothesis.given(count=st.integers(0, 300), context=st.integers(2, 64), first=st.integers(0, 1), data=st.data())
def test_windows_cover_a_text_and_give_each_token_a_context(
    count: int, context: int, first: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context - 1))
    scored: list[int] = []
    for window in windows(count, context=context, stride=stride, first_scored=first):
        assert 0 <= window.start <= window.scored < window.end <= count
        assert window.end - window.start <= context
        assert window.scored > window.start or window.scored == 0  # something stands before each scored token
        if window.start:
            assert window.end - window.start == context  # the last window too sees all it can
            assert window.scored - window.start >= context - stride
        scored += range(window.scored, window.end)
    assert scored == list(range(first, count))


@pytest.mark.parametrize(
    ("context", "stride", "count", "message"),
    [
        (1, 1, 10, "context must be at least 2, got 1."),
        (8, 8, 10, "stride must be at least 1 and at most 7, got 8."),
        (8, 0, 10, "stride must be at least 1 and at most 7, got 0."),
        (8, 4, 1, "The text has 1 tokens: none can be scored."),
        (8, 4, 0, "The text has 0 tokens: none can be scored."),
    ],
)
def test_what_cannot_be_scored_is_refused(context: int, stride: int, count: int, message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        score(ScoringFake(50), tokens_of(count), before=[], context=context, stride=stride, on_window=print)
    assert str(caught.value) == message


def test_an_impossible_token_makes_perplexity_infinite() -> None:
    assert Perplexity(token_ids=(5, 6), nll=(1.0, math.inf), num_windows=1).perplexity == math.inf
    assert Perplexity(token_ids=(5,), nll=(1e4,), num_windows=1).perplexity == math.inf
    assert Perplexity(token_ids=(5,), nll=(1.0,), num_windows=1).standard_error is None


@pytest.mark.parametrize(("prefix", "suffix"), [([], []), ([BOS], []), ([BOS], [2]), ([], [2]), ([BOS, 3], [2])])
@pytest.mark.parametrize("text", ["", "ab", "\x01\x01"])
def test_special_tokens_are_told_from_the_text(prefix: list[int], suffix: list[int], text: str) -> None:
    class Encoder:
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            ids = [ord(char) for char in text]
            return [*prefix, *ids, *suffix] if add_special_tokens else ids

    before, ids = split_special(Encoder(), text)
    assert ids == [ord(char) for char in text]
    if text == "ab":
        assert before == prefix
