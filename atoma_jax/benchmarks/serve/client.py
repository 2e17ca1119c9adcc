"""One request to an OpenAI-compatible server: sent, streamed, timed by when pieces of text come, counted by `usage`.

A piece may hold several tokens, and some servers send pieces that hold none. Pieces with text are therefore what times
are taken of, and the server's own `usage` is the only count of tokens. A request without one has failed, as have one
that breaks off, one that is refused and one that brings an error in its stream.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from atoma_jax.benchmarks.serve.events import EventReader

_SHOWN = 300  # characters of a server's error


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What requests go to, and what they have in common."""

    url: str  # of the server, without /v1
    model: str
    chat: bool = False  # /v1/chat/completions instead of /v1/completions
    body: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())  # further keys of every request

    @property
    def path(self) -> str:
        """Where requests go."""
        return f"{self.url}/v1/chat/completions" if self.chat else f"{self.url}/v1/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request of a workload."""

    prompt: str | list[int]  # token ids for completions alone
    prompt_tokens: int  # as planned; the server counts those of a chat template in
    output_tokens: int  # at most


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of a request. Times are seconds of one clock."""

    start: float
    arrivals: list[float] = field(default_factory=lambda: list[float]())  # of pieces with text
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""  # empty: it succeeded

    @property
    def ttft(self) -> float:
        """Until the first piece."""
        return self.arrivals[0] - self.start

    @property
    def latency(self) -> float:
        """Until the last piece."""
        return self.arrivals[-1] - self.start

    @property
    def itls(self) -> list[float]:
        """Between one piece and the next."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """A token's mean time after the first; None where there is one token alone."""
        if self.output_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.output_tokens - 1)


async def send(client: httpx.AsyncClient, target: Target, ask: Ask) -> Outcome:
    """Sends one request and reads its stream to the end. Never raises for what a server or a network does."""
    outcome = Outcome(start=time.perf_counter())
    try:
        async with client.stream("POST", target.path, json=_body(target, ask)) as response:
            if response.status_code != 200:
                outcome.error = f"HTTP {response.status_code}: {_message(await response.aread())}"
                return outcome
            await _read(response, outcome, chat=target.chat)
    except (httpx.HTTPError, httpx.StreamError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        outcome.error = f"the stream holds what no OpenAI-compatible server sends: {type(error).__name__}: {error}"
    return outcome


def _body(target: Target, ask: Ask) -> dict[str, Any]:
    if target.chat:
        subject: dict[str, Any] = {
            "messages": [{"role": "user", "content": ask.prompt}],
            "max_completion_tokens": ask.output_tokens,
        }
    else:
        subject = {"prompt": ask.prompt, "max_tokens": ask.output_tokens}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": target.model, **subject, **stream, **target.body}


async def _read(response: httpx.Response, outcome: Outcome, *, chat: bool) -> None:
    reader, pieces, done = EventReader(), list[str](), False
    usage: Mapping[str, Any] | None = None
    async for received in response.aiter_raw():
        now = time.perf_counter()
        for data in reader.feed(received):
            if data == b"[DONE]":
                done = True
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                outcome.error = _message(data)
                return
            usage = chunk.get("usage") or usage
            piece = "".join(_text(choice, chat=chat) for choice in chunk["choices"])
            if piece:
                outcome.arrivals.append(now)
                pieces.append(piece)
    outcome.text = "".join(pieces)
    if not done:
        outcome.error = "the stream broke off: it did not end with [DONE]"
    elif usage is None:
        outcome.error = "the server reports no usage (stream_options.include_usage): tokens cannot be counted"
    elif not pieces:
        outcome.error = "the stream held no text"
    else:
        outcome.prompt_tokens = int(usage["prompt_tokens"])
        outcome.output_tokens = int(usage["completion_tokens"])


def _text(choice: Mapping[str, Any], *, chat: bool) -> str:
    """What a choice brings. A reasoning model's thoughts are tokens, too."""
    fields = (choice["delta"], ("reasoning", "reasoning_content", "content")) if chat else (choice, ("text",))
    return "".join(fields[0].get(name) or "" for name in fields[1])  # a TypeError where one is no text


def _message(body: bytes) -> str:
    """The message of an error object; what is none is shown as it is."""
    try:
        value: Any = json.loads(body)
        error: Any = value.get("error", value)
        text = error if isinstance(error, str) else str(error.get("message", error))
    except (ValueError, AttributeError):
        text = body.decode(errors="replace")
    return text[:_SHOWN]
