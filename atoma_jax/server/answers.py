"""What answers of both kinds have in common: ids, usage, a request's own times, and logprobs in OpenAI's two forms."""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atoma_jax import AsyncLLM, Logprob, RequestOutput
from atoma_jax.outputs import PositionLogprobs
from atoma_jax.server.schemas import SamplingRequest
from atoma_jax.server.stream import encode, event_of

LOWEST_LOGPROB = -9999.0  # stands for -inf, which JSON cannot hold

Entries = Sequence[PositionLogprobs | None]


@dataclass(slots=True)
class Usage:
    """Tokens of one HTTP request, over its prompts and samples."""

    with_details: bool
    prompts: dict[int, int] = field(default_factory=lambda: dict[int, int]())  # by prompt
    cached: dict[int, int] = field(default_factory=lambda: dict[int, int]())
    completion: int = 0

    def see(self, index: int, output: RequestOutput, *, new_tokens: int) -> None:
        """Takes in an output of a prompt."""
        self.prompts[index] = len(output.prompt_token_ids)
        self.cached[index] = output.num_cached_tokens
        self.completion += new_tokens

    def body(self) -> dict[str, Any]:
        """As clients read it."""
        prompt = sum(self.prompts.values())
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion,
            "total_tokens": prompt + self.completion,
        }
        if self.with_details:
            usage["prompt_tokens_details"] = {"cached_tokens": sum(self.cached.values())}
        return usage


class Report:
    """The block `metrics` of a request that asks for it (`include_metrics`): vLLM's names, and some more."""

    def __init__(self, request: SamplingRequest):
        """Without `include_metrics` there is none."""
        self.wanted = bool(request.include_metrics)
        self._outputs: list[RequestOutput] = []

    def see(self, output: RequestOutput) -> None:
        """Takes in a prompt's last output."""
        if self.wanted:
            self._outputs.append(output)

    def keys(self) -> dict[str, Any]:
        """The block under its key, for an answer or the last chunk; empty where it is not wanted.

        Of several prompts it holds the longest times and the sums of what is counted.
        """
        if not self._outputs:
            return {}
        times = [output.metrics for output in self._outputs if output.metrics is not None]
        alone = len(times) == 1 and len(self._outputs[0].outputs) == 1  # else tokens come side by side
        tokens, steps = sum(each.num_generation_tokens for each in times), sum(each.num_steps for each in times)
        generation = max((each.decode_time or 0.0 for each in times), default=0.0)
        padding = sum((each.padding_ratio or 0.0) * each.num_steps for each in times)
        body = {
            "time_to_first_token_ms": _longest_ms([each.time_to_first_token for each in times]),
            "queue_time_ms": _longest_ms([each.queue_time for each in times]),
            "prefill_time_ms": _longest_ms([each.prefill_time for each in times]),
            "generation_time_ms": _longest_ms([each.decode_time for each in times]),
            "e2e_time_ms": _longest_ms([each.e2e_time for each in times]),
            "mean_itl_ms": _longest_ms([times[0].time_per_output_token]) if alone else None,
            "tokens_per_second": round(tokens / generation, 2) if generation else None,
            "cached_tokens": sum(output.num_cached_tokens for output in self._outputs),
            "preemptions": sum(each.num_preemptions for each in times),
            "steps": steps,
            "padding_ratio": round(padding / steps, 4) if steps else None,
        }
        return {"metrics": body}


def _longest_ms(seconds: Sequence[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return round(1e3 * max(known), 3) if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What stands around every answer and chunk of one request."""

    prefix: str  # of the id: cmpl or chatcmpl
    kind: str  # the key "object"
    model: str
    fingerprint: str
    suffix: str = ""  # of the id; empty: random
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(init=False)
    _head: str = field(init=False)  # of every chunk, as JSON that goes on

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.prefix}-{self.suffix or secrets.token_hex(8)}")
        object.__setattr__(self, "_head", encode(self._keys())[:-1] + ",")

    def around(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """A whole answer."""
        return {**self._keys(), "choices": choices, "usage": usage}

    def event(
        self,
        choices: list[dict[str, Any]],
        usage: dict[str, Any] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> bytes:
        """A chunk of a stream, as an event. Without `usage` it has no such key; `more` stands beside it."""
        body: dict[str, Any] = {"choices": choices}
        if usage is not None:
            body["usage"] = usage
        if more:
            body |= more
        return event_of(self._head + encode(body)[1:])

    def _keys(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


@dataclass(frozen=True, slots=True)
class StreamUsage:
    """When a stream reports usage."""

    at_end: bool
    always: bool

    @classmethod
    def of(cls, request: SamplingRequest) -> "StreamUsage":
        """What `stream_options` say."""
        options = request.stream_options
        if options is None:
            return cls(False, False)
        return cls(bool(options.include_usage), bool(options.continuous_usage_stats and options.include_usage))


class LogprobWriter:
    """Logprobs as JSON."""

    def __init__(self, llm: AsyncLLM, *, top: int, as_ids: bool):
        """`top` entries beside the chosen token; `as_ids` spells every token as `token_id:5`."""
        self._tokenizer, self._top, self._as_ids = llm.get_tokenizer(), top, as_ids

    def completion(self, ids: Sequence[int], entries: Entries, *, offset: int) -> dict[str, Any]:
        """The arrays of `/v1/completions`; an entry is None for the first token of a prompt.

        Args:
            ids: the tokens.
            entries: theirs.
            offset: characters before the first token.
        """
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token, entry in zip(ids, entries, strict=True):
            chosen = None if entry is None else entry[token]
            text = self._text(token, chosen)
            tokens.append(text)
            offsets.append(offset)
            offset += len(text)
            values.append(None if chosen is None else _clamped(chosen))
            if entry is None:
                tops.append(None)
                continue
            top: dict[str, float] = {}
            for other, logprob in entry.items():  # the chosen one first: of two that read alike its value stays
                if other == token or (logprob.rank or 0) <= self._top:
                    top.setdefault(self._text(other, logprob), _clamped(logprob))
            tops.append(top)
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}

    def chat(self, ids: Sequence[int], entries: Sequence[PositionLogprobs]) -> dict[str, Any]:
        """The list of `/v1/chat/completions`."""
        content: list[dict[str, Any]] = []
        for token, entry in zip(ids, entries, strict=True):
            tops = [self._token(other, value) for other, value in entry.items() if (value.rank or 0) <= self._top]
            tops.sort(key=lambda top: -top["logprob"])
            content.append({**self._token(token, entry[token]), "top_logprobs": tops})
        return {"content": content}

    def prompt(self, entries: Entries) -> list[dict[str, Any] | None]:
        """`prompt_logprobs`, by token id."""
        return [
            None if entry is None else {str(token): self._ranked(value) for token, value in entry.items()}
            for entry in entries
        ]

    def _ranked(self, value: Logprob) -> dict[str, Any]:
        return {"logprob": _clamped(value), "rank": value.rank, "decoded_token": value.decoded_token}

    def _token(self, token: int, value: Logprob) -> dict[str, Any]:
        raw = list(self._tokenizer.token_bytes(token))
        return {"token": self._text(token, value), "logprob": _clamped(value), "bytes": raw}

    def _text(self, token: int, value: Logprob | None) -> str:
        if self._as_ids:
            return f"token_id:{token}"
        if value is not None and value.decoded_token is not None:
            return value.decoded_token
        return self._tokenizer.decode([token], skip_special_tokens=False, continues=True)


def _clamped(value: Logprob) -> float:
    return max(value.logprob, LOWEST_LOGPROB)
