"""Perplexity and divergence against float64 numpy on made-up scores, and the windows that a long text is cut into."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from atoma_jax import SamplingParams
from atoma_jax.errors import ParameterError
from atoma_jax.evaluation import Divergence, Perplexity, diverge, score, split_special, windows
from atoma_jax.outputs import ComparedTokens, CompletionOutput, Logprob, PositionLogprobs, RequestOutput

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
@pytest.mark.parametrize("at_once", [1, 4])
def test_every_token_counts_once_whatever_the_windows(
    context: int, stride: int, before: list[int], at_once: int
) -> None:
    fake, ids = ScoringFake(50), tokens_of(150)
    context += len(before)
    progress: list[int] = []
    result = score(fake, ids, before=before, context=context, stride=stride, at_once=at_once, on_window=progress.append)
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


class ComparingFake:
    """Two tables of scores; three windows at once."""

    def __init__(self, vocab_size: int):
        self.base, self.model = ScoringFake(vocab_size).table, ScoringFake(vocab_size).table[::-1]
        self.contexts: set[int] = set()

    def windows_at_once(self, context: int) -> int:
        return 3

    def compare(
        self,
        windows: Sequence[tuple[Sequence[int], int]],
        *,
        context: int,
        rows: int,
        on_tokens: Callable[[int], object],
    ) -> list[ComparedTokens]:
        assert len(windows) <= rows <= 3
        return [self._compare(ids, first, context, on_tokens) for ids, first in windows]

    def _compare(
        self, ids: Sequence[int], first: int, context: int, on_tokens: Callable[[int], object]
    ) -> ComparedTokens:
        assert len(ids) <= context
        self.contexts.add(context)
        before, after = np.array(list(itertools.pairwise(ids))[first - 1 :]).T
        base, model = self.base[before], self.model[before]
        on_tokens(len(after))
        return ComparedTokens(
            base_nll=-base[np.arange(len(after)), after].astype(np.float32),
            nll=-model[np.arange(len(after)), after].astype(np.float32),
            kld=(np.exp(base) * (base - model)).sum(axis=1).astype(np.float32),
            same_top=base.argmax(axis=1) == model.argmax(axis=1),
        )


@pytest.mark.parametrize(("context", "stride"), [(200, 100), (64, 63), (64, 1), (2, 1)])
@pytest.mark.parametrize("before", [[], [BOS]])
def test_every_token_is_compared_once_whatever_the_windows(context: int, stride: int, before: list[int]) -> None:
    fake, ids = ComparingFake(50), tokens_of(150)
    context += len(before)
    progress: list[int] = []
    result = diverge(fake, ids, before=before, context=context, stride=stride, on_tokens=progress.append)
    chain = np.array([*before, *ids])
    p, q = fake.base[chain[:-1]], fake.model[chain[:-1]]
    at = np.arange(len(p)), chain[1:]
    np.testing.assert_allclose(result.base_nll, -p[at], rtol=1e-6)
    np.testing.assert_allclose(result.nll, -q[at], rtol=1e-6)
    np.testing.assert_allclose(result.kld, (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(result.same_top, p.argmax(axis=1) == q.argmax(axis=1))
    assert sum(progress) == len(p)
    assert fake.contexts == {min(context, len(chain))}  # one shape, no larger than the text


def test_a_text_without_a_token_to_compare_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"The text has 1 tokens: none can be scored\."):
        diverge(ComparingFake(50), [3], before=[], context=8, stride=4, on_tokens=print)


def made_up(count: int = 400) -> Divergence:
    rng = np.random.default_rng(0)
    base = rng.exponential(3, count)
    return Divergence(
        base_nll=base,
        nll=np.maximum(base + rng.normal(0.1, 0.3, count), 0),
        kld=rng.exponential(0.05, count),
        same_top=rng.random(count) < 0.9,
        num_windows=1,
    )


def test_statistics_are_those_of_llama_cpp() -> None:
    """By sums of powers, as its perplexity.cpp has them: a mean's error is sqrt((Σx²/n − mean²) / (n − 1))."""
    result = made_up()
    n = len(result.kld)

    def mean_and_error(values: np.ndarray) -> tuple[float, float]:
        mean = values.sum() / n
        return mean, math.sqrt(((values**2).sum() / n - mean**2) / (n - 1))

    numbers = result.summary()
    nll, nll_error = mean_and_error(result.nll)
    base, base_error = mean_and_error(result.base_nll)
    covariance = ((result.nll * result.base_nll).sum() / n - nll * base) / (n - 1)
    dp = np.exp(-result.nll) - np.exp(-result.base_nll)
    square, square_error = mean_and_error(dp**2)
    same = result.same_top.sum() / n
    expected = {
        "mean_nll": (nll, nll_error),
        "base_mean_nll": (base, base_error),
        "perplexity": (math.exp(nll), math.exp(nll) * nll_error),
        "base_perplexity": (math.exp(base), math.exp(base) * base_error),
        "log_perplexity_ratio": (nll - base, math.sqrt(nll_error**2 + base_error**2 - 2 * covariance)),
        "mean_kld": mean_and_error(result.kld),
        "mean_dp": mean_and_error(dp),
        "rms_dp": (math.sqrt(square), 0.5 / math.sqrt(square) * square_error),
        "same_top": (same, math.sqrt(same * (1 - same) / (n - 1))),
    }
    for name, (value, error) in expected.items():
        assert numbers.pop(name) == pytest.approx(value, rel=1e-9), name
        assert numbers.pop(f"{name}_se") == pytest.approx(error, rel=1e-9), name
    ordered = np.sort(result.kld)
    place = 0.99 * (n - 1)
    low = ordered[int(place)]
    assert numbers.pop("p99_kld") == pytest.approx(low + (place - int(place)) * (ordered[int(place) + 1] - low))
    assert numbers.pop("median_kld") == pytest.approx((ordered[n // 2 - 1] + ordered[n // 2]) / 2)
    assert numbers.pop("max_kld") == ordered[-1]
    assert numbers == {"tokens": n, "nan_tokens": 0}


def test_scores_that_are_nan_are_counted_and_not_left_out() -> None:
    result = made_up()
    result.kld[3] = result.nll[3] = np.nan
    numbers = result.summary()
    assert numbers["nan_tokens"] == 1
    for name in ("perplexity", "mean_kld", "mean_kld_se", "rms_dp", "max_kld", "median_kld"):
        assert math.isnan(numbers[name] or 0), name
    assert numbers["base_perplexity"] == made_up().summary()["base_perplexity"]


def test_a_token_that_the_model_holds_impossible_makes_its_divergence_infinite() -> None:
    result = made_up(50)
    result.kld[:4] = result.nll[:4] = np.inf
    numbers = result.summary()
    assert numbers["perplexity"] == numbers["mean_kld"] == numbers["max_kld"] == numbers["p99_kld"] == math.inf
    assert math.isfinite(numbers["median_kld"] or math.inf)
    assert math.isfinite(numbers["rms_dp"] or math.inf)
    assert numbers["nan_tokens"] == 0


def test_a_single_token_has_no_standard_error() -> None:
    numbers = made_up(1).summary()
    assert {name for name, value in numbers.items() if value is None} == {
        name for name in numbers if name.endswith("_se")
    }
