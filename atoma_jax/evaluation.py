"""Perplexity of a text under a model, by teacher forcing: every token scored given those before it.

A text longer than the model is cut into windows. Consecutive windows overlap by `context - stride` tokens (one at
least), and a token is scored once: in the first window that holds it behind another token. So all tokens but the text's
first count, and that one too where the model wants a token before every prompt (BOS).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from atoma_jax.errors import ParameterError
from atoma_jax.outputs import RequestOutput
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


def score(
    llm: ScoringEngine,
    token_ids: Sequence[int],
    *,
    before: Sequence[int],
    context: int,
    stride: int,
    on_window: Callable[[int], object],
) -> Perplexity:
    """Scores a text.

    Args:
        llm: the engine.
        token_ids: of the text, without special tokens.
        before: put before every window, BOS as a rule.
        context: tokens of a window, `before` included.
        stride: new tokens of each further window.
        on_window: told how many tokens were scored, window by window.

    Raises:
        ParameterError: the text has no token to score, or context and stride do not fit together.
    """
    room = context - len(before)
    if room < 2:
        raise ParameterError("context", context, f"context must be at least {len(before) + 2}, got {context}.")
    if not 1 <= stride < room:
        raise ParameterError("stride", stride, f"stride must be at least 1 and at most {room - 1}, got {stride}.")
    cut = windows(len(token_ids), context=room, stride=stride, first_scored=0 if before else 1)
    if not cut:
        raise ParameterError("text", len(token_ids), f"The text has {len(token_ids)} tokens: none can be scored.")
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    nll: list[float] = []
    for window in cut:
        ids = [*before, *token_ids[window.start : window.end]]
        output = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0]
        nll += _nll(output, ids, len(before) + window.scored - window.start)
        on_window(window.end - window.scored)
    return Perplexity(token_ids=tuple(token_ids[cut[0].scored :]), nll=tuple(nll), num_windows=len(cut))


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
