"""What a caller gets back: the outputs of a request, their logprobs, and the request's times.

Plain data, without JAX. Filled by the engine; turned into JSON by the server.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's place in the model's true distribution, before temperature, penalties, biases and filters.

    Attributes:
        logprob: natural logarithm of its probability; -inf is possible.
        rank: 1 for the most likely token; of equal ones the lower id comes first.
        decoded_token: its text; None where detokenization is off.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]  # of one position, by token id: the chosen token first, then by rank


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One of a request's n samples.

    Attributes:
        index: which of the n.
        text: empty where detokenization is off.
        token_ids: the generated tokens, a stop token among them.
        cumulative_logprob: sum over the tokens; None unless logprobs were asked for.
        logprobs: one entry a token; None unless asked for.
        finish_reason: None while it goes on.
        stop_reason: the stop string or stop token id that ended it; None for end-of-sequence or any other reason.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass(slots=True, kw_only=True)
class RequestMetrics:
    """When things happened to a request: seconds of the engine's monotonic clock; None before they happen."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_generation_tokens: int = 0
    num_preemptions: int = 0  # known when it is finished, like what follows
    num_steps: int = 0  # of the engine, from the first that held the request to its last
    padding_ratio: float | None = None  # share of these steps' positions that held no token of anybody

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival until a step first held the request."""
        return _span(self.arrival_time, self.first_scheduled_time)

    @property
    def prefill_time(self) -> float | None:
        """Seconds from there until its first token."""
        return _span(self.first_scheduled_time, self.first_token_time)

    @property
    def decode_time(self) -> float | None:
        """Seconds from its first token until its last one so far."""
        return _span(self.first_token_time, self.last_token_time)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival until its first token (TTFT)."""
        return _span(self.arrival_time, self.first_token_time)

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds a token after the first (TPOT); None before a second one."""
        if self.decode_time is None or self.num_generation_tokens < 2:
            return None
        return self.decode_time / (self.num_generation_tokens - 1)

    @property
    def e2e_time(self) -> float | None:
        """Seconds from arrival until the request was finished."""
        return _span(self.arrival_time, self.finished_time)


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A request's state at one moment.

    Attributes:
        request_id: the request's name.
        prompt: its text, where the caller gave text.
        prompt_token_ids: its tokens.
        prompt_logprobs: one entry a prompt token, None for the first; None unless asked for.
        outputs: the samples, by index.
        finished: whether all of them are.
        metrics: its times.
        num_cached_tokens: prompt tokens whose KV came from the prefix cache.
        embedding: the prompt's vector, as pooled, from an engine that pools; None before it is there.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = field(default=0)
    embedding: Float32[np.ndarray, " D"] | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """A prompt as a vector."""

    embedding: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequestOutput:
    """What `LLM.embed` gives for a prompt."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True


def unit_length(vector: Float32[np.ndarray, " D"]) -> Float32[np.ndarray, " D"]:
    """A vector of the same direction and length 1; zeros stay."""
    length = float(np.linalg.norm(vector))
    return vector / np.float32(length) if length > 0 else vector


def position_logprobs(
    *,
    token_id: int,
    logprob: float,
    rank: int,
    top_ids: Sequence[int],
    top_logprobs: Sequence[float],
    decode: Callable[[int], str] | None,
) -> PositionLogprobs:
    """The entry of one position: the chosen token, then the likeliest ones by rank.

    Args:
        token_id: the chosen token (of a prompt: the actual one), its `logprob` and `rank`.
        logprob: see `token_id`.
        rank: see `token_id`.
        top_ids: the likeliest tokens, best first: as many as the caller asked for.
        top_logprobs: theirs.
        decode: text of one token; None where detokenization is off.
    """

    def text(token: int) -> str | None:
        return None if decode is None else decode(token)

    entry = {token_id: Logprob(logprob, rank, text(token_id))}
    for place, (token, value) in enumerate(zip(top_ids, top_logprobs, strict=True), start=1):
        if token != token_id:  # the chosen token has one value wherever a client finds it
            entry[token] = Logprob(value, place, text(token))
    return entry


def _span(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ComparedTokens:
    """What two models say of the same tokens, each given those before it. NaN where a model's logits were not finite.

    Attributes:
        base_nll: negative log-likelihoods under the base, in nats.
        nll: under the other model.
        kld: Kullback-Leibler divergences D(base‖model) of the distributions of the next token, in nats.
        same_top: whether both hold the same token for the likeliest.
    """

    base_nll: Float32[np.ndarray, " T"]
    nll: Float32[np.ndarray, " T"]
    kld: Float32[np.ndarray, " T"]
    same_top: Bool[np.ndarray, " T"]
