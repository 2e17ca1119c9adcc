"""Perplexity of a text, and a model's divergence from a base over it, by teacher forcing: every token scored given
those before it.

A text longer than the model is cut into windows. Consecutive windows overlap by `context - stride` tokens (one at
least), and a token is scored once: in the first window that holds it behind another token. So all tokens but the text's
first count, and that one too where the model wants a token before every prompt (BOS).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64

from atoma_jax.errors import ParameterError
from atoma_jax.outputs import ComparedTokens, RequestOutput
from atoma_jax.sampling_params import SamplingParams


@runtime_checkable
class TextEncoder(Protocol):
    """The part of a tokenizer that makes ids of a text."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with those that the model wants around it or without."""
        ...


@runtime_checkable
class ScoringEngine(Protocol):
    """The part of `LLM` that scores prompts."""

    def generate(
        self,
        prompts: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Finished outputs, in the order of the prompts."""
        ...


@runtime_checkable
class ComparingPair(Protocol):
    """The part of `ModelPair` that compares."""

    def windows_at_once(self, context: int) -> int:
        """Windows of up to `context` tokens that should be compared together."""
        ...

    def compare(
        self,
        windows: Sequence[tuple[Sequence[int], int]],
        *,
        context: int,
        rows: int,
        on_tokens: Callable[[int], object],
    ) -> list[ComparedTokens]:
        """Scores of each window's tokens, from the index beside it on; never more than `rows` windows at once."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Tokens `start` to `end` of a text go through the model together; those from `scored` on count."""

    start: int
    end: int
    scored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """Scores of a text.

    Attributes:
        token_ids: the tokens that count.
        nll: their negative log-likelihoods in nats; infinity is possible.
        num_windows: how many the text was cut into.
    """

    token_ids: tuple[int, ...]
    nll: tuple[float, ...]
    num_windows: int

    @property
    def mean_nll(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return math.fsum(self.nll) / len(self.nll)

    @property
    def standard_error(self) -> float | None:
        """Of `mean_nll`, taking tokens for independent; None for a single token."""
        if len(self.nll) < 2:
            return None
        mean = self.mean_nll
        variance = math.fsum((value - mean) ** 2 for value in self.nll) / (len(self.nll) - 1)
        return math.sqrt(variance / len(self.nll))

    @property
    def perplexity(self) -> float:
        """exp(mean_nll); infinity where that is beyond a float."""
        try:
            return math.exp(self.mean_nll)
        except OverflowError:
            return math.inf


def split_special(tokenizer: TextEncoder, text: str) -> tuple[list[int], list[int]]:
    """The tokens that the model wants before every prompt, and the text's own. What it wants after one is left out.

    Raises:
        ParameterError: the text has no UTF-8 form.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    around = tokenizer.encode(text, add_special_tokens=True)
    before = next(n for n in range(len(around) - len(ids) + 1) if around[n : n + len(ids)] == ids)
    return around[:before], ids


def windows(num_tokens: int, *, context: int, stride: int, first_scored: int) -> list[Window]:
    """Cuts `num_tokens` into windows of at most `context`, the last one ending with the text.

    Args:
        num_tokens: of the text.
        context: tokens of a window, at least 2.
        stride: new tokens of each further window, at least 1 and below `context`.
        first_scored: 1, or 0 where something comes before the text that its first token can be predicted from.
    """
    cut: list[Window] = []
    scored = first_scored
    end = min(context, num_tokens)
    while scored < num_tokens:
        cut.append(Window(start=max(0, end - context), end=end, scored=scored))
        scored, end = end, min(end + stride, num_tokens)
    return cut


def _batched(cut: Sequence[Window], size: int) -> Iterator[Sequence[Window]]:
    """Groups of `size` windows in order, the last one with what is left."""
    return (cut[start : start + size] for start in range(0, len(cut), size))


def score(
    llm: ScoringEngine,
    token_ids: Sequence[int],
    *,
    before: Sequence[int],
    context: int,
    stride: int,
    at_once: int = 1,
    on_window: Callable[[int], object],
) -> Perplexity:
    """Scores a text.

    Args:
        llm: the engine.
        token_ids: of the text, without special tokens.
        before: put before every window, BOS as a rule.
        context: tokens of a window, `before` included.
        stride: new tokens of each further window.
        at_once: windows that the engine is given together.
        on_window: told how many tokens were scored, window by window.

    Raises:
        ParameterError: the text has no token to score, or context and stride do not fit together.
    """
    cut = _cut(len(token_ids), before, context, stride)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    nll: list[float] = []
    for group in _batched(cut, at_once):
        together = [_prompt(window, token_ids, before) for window in group]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in together], params, use_tqdm=False)
        for window, (ids, first), output in zip(group, together, outputs, strict=True):
            nll += _nll(output, ids, first)
            on_window(window.end - window.scored)
    return Perplexity(token_ids=tuple(token_ids[cut[0].scored :]), nll=tuple(nll), num_windows=len(cut))


def _cut(num_tokens: int, before: Sequence[int], context: int, stride: int) -> list[Window]:
    room = context - len(before)
    if room < 2:
        raise ParameterError("context", context, f"context must be at least {len(before) + 2}, got {context}.")
    if not 1 <= stride < room:
        raise ParameterError("stride", stride, f"stride must be at least 1 and at most {room - 1}, got {stride}.")
    cut = windows(num_tokens, context=room, stride=stride, first_scored=0 if before else 1)
    if not cut:
        raise ParameterError("text", num_tokens, f"The text has {num_tokens} tokens: none can be scored.")
    return cut


def _prompt(window: Window, token_ids: Sequence[int], before: Sequence[int]) -> tuple[list[int], int]:
    """What goes through the model for a window, and where in it the tokens that count begin."""
    return [*before, *token_ids[window.start : window.end]], len(before) + window.scored - window.start


def _nll(output: RequestOutput, ids: Sequence[int], first: int) -> list[float]:
    """Negative log-likelihoods of a prompt's tokens from `first` on."""
    scores = output.prompt_logprobs
    assert scores is not None, "prompt_logprobs were asked for"
    assert len(scores) == len(ids), "one entry a prompt token"
    found: list[float] = []
    for token_id, entry in zip(ids[first:], scores[first:], strict=True):
        assert entry is not None, "only a prompt's first token has no score"
        found.append(-entry[token_id].logprob)
    return found


class Estimate(NamedTuple):
    """A mean over tokens, or a function of one."""

    value: float
    standard_error: float | None  # takes tokens for independent; None for a single one


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Divergence:
    """How far a model is from a base over a text. Statistics are defined as in llama.cpp's `llama-perplexity
    --kl-divergence`; those of scores that are NaN are NaN.

    Attributes:
        base_nll: negative log-likelihoods of the tokens that count under the base, in nats; infinity is possible.
        nll: under the model.
        kld: divergences D(base‖model) of the distributions of each of them, in nats.
        same_top: whether both hold the same token for the likeliest; false where one is NaN.
        num_windows: how many the text was cut into.
    """

    base_nll: Float64[np.ndarray, " T"]
    nll: Float64[np.ndarray, " T"]
    kld: Float64[np.ndarray, " T"]
    same_top: Bool[np.ndarray, " T"]
    num_windows: int

    @property
    def num_nan(self) -> int:
        """Tokens at which a model's logits were not finite."""
        return int(np.isnan(self.kld).sum())

    @property
    def estimates(self) -> dict[str, Estimate]:
        """By name: negative log-likelihoods and divergences in nats, probabilities as fractions of 1.

        dp is the probability of the text's own token under the model less that under the base.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            mean_nll, base_mean_nll = _mean(self.nll), _mean(self.base_nll)
            dp = np.exp(-self.nll) - np.exp(-self.base_nll)
            same = float(self.same_top.mean())
            n = len(self.same_top)
            return {
                "perplexity": _exponential(mean_nll),
                "base_perplexity": _exponential(base_mean_nll),
                "mean_nll": mean_nll,
                "base_mean_nll": base_mean_nll,
                "log_perplexity_ratio": _mean(self.nll - self.base_nll),
                "mean_kld": _mean(self.kld),
                "same_top": Estimate(same, math.sqrt(same * (1 - same) / (n - 1)) if n > 1 else None),
                "mean_dp": _mean(dp),
                "rms_dp": _root(_mean(dp**2)),
            }

    @property
    def kld_quantiles(self) -> dict[str, float]:
        """Of `kld`, by name. Between two tokens they are interpolated linearly."""
        levels = {"median_kld": 0.5, "p99_kld": 0.99, "max_kld": 1.0}
        if not np.isfinite(self.kld).all():  # nothing lies between two infinities
            return {name: float(np.quantile(self.kld, level, method="higher")) for name, level in levels.items()}
        return {name: float(np.quantile(self.kld, level)) for name, level in levels.items()}

    def summary(self) -> dict[str, float | int | None]:
        """All numbers: `estimates` with their standard errors as NAME_se, quantiles, counts."""
        numbers: dict[str, float | int | None] = {"tokens": len(self.kld), "nan_tokens": self.num_nan}
        for name, estimate in self.estimates.items():
            numbers |= {name: estimate.value, f"{name}_se": estimate.standard_error}
        return numbers | self.kld_quantiles


def diverge(
    pair: ComparingPair,
    token_ids: Sequence[int],
    *,
    before: Sequence[int],
    context: int,
    stride: int,
    on_tokens: Callable[[int], object],
) -> Divergence:
    """Compares two models over a text.

    Args:
        pair: the models.
        token_ids: of the text, without special tokens.
        before: put before every window, BOS as a rule.
        context: tokens of a window, `before` included.
        stride: new tokens of each further window.
        on_tokens: told how many tokens were scored, chunk by chunk.

    Raises:
        ParameterError: the text has no token to score, or context and stride do not fit together.
    """
    cut = _cut(len(token_ids), before, context, stride)
    longest = len(before) + max(window.end - window.start for window in cut)
    parts: list[ComparedTokens] = []
    rows = min(len(cut), pair.windows_at_once(longest))
    for group in _batched(cut, rows):
        together = [_prompt(window, token_ids, before) for window in group]
        parts += pair.compare(together, context=longest, rows=rows, on_tokens=on_tokens)
    return Divergence(
        base_nll=np.concatenate([part.base_nll for part in parts]).astype(np.float64),
        nll=np.concatenate([part.nll for part in parts]).astype(np.float64),
        kld=np.concatenate([part.kld for part in parts]).astype(np.float64),
        same_top=np.concatenate([part.same_top for part in parts]),
        num_windows=len(cut),
    )


def _mean(values: Float64[np.ndarray, " T"]) -> Estimate:
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(float(values.mean()), error)


def _exponential(mean: Estimate) -> Estimate:
    """exp of a mean; its error by the first derivative, as below."""
    value = float(np.exp(mean.value))
    return Estimate(value, None if mean.standard_error is None else value * mean.standard_error)


def _root(mean: Estimate) -> Estimate:
    value = math.sqrt(mean.value)
    if not value or mean.standard_error is None:
        return Estimate(value, mean.standard_error)
    return Estimate(value, mean.standard_error / (2 * value))
