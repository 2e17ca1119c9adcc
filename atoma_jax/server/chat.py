"""Answers of `/v1/chat/completions`, whole or as a stream of deltas."""

import secrets
from collections.abc import Sequence
from typing import Any

from atoma_jax import AsyncLLM, CompletionOutput, RequestOutput
from atoma_jax.server.answers import Frame, LogprobWriter, Report, StreamUsage, Usage
from atoma_jax.server.generation import Generation
from atoma_jax.server.schemas import ChatRequest
from atoma_jax.server.stream import Events
from atoma_jax.server.tool_calls import Piece, ToolCallParser
from atoma_jax.server.tools import ToolUse


class ChatWriter:
    """Writes the answer to one conversation."""

    def __init__(self, llm: AsyncLLM, request: ChatRequest, frame: Frame, usage: Usage, tools: ToolUse | None = None):
        """`usage` is filled in as tokens come; `tools` says how answers call them."""
        self._request, self._frame, self.usage, self._tools = request, frame, usage, tools
        self._report = Report(request)
        self._logprobs = LogprobWriter(
            llm, top=request.top_logprobs or 0, as_ids=bool(request.return_tokens_as_token_ids)
        )
        last = request.messages[-1].get("content") if request.echo and request.messages else None
        self._echo = last if isinstance(last, str) else ""
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._parsers: dict[int, ToolCallParser] = {}  # of streamed samples

    async def answer(self, generation: Generation) -> dict[str, Any]:
        """The whole answer."""
        body: dict[str, Any] = {}
        async with generation:
            async for index, output in generation:
                if output.finished:
                    self._report.see(output)
                    for sample in output.outputs:
                        self.usage.see(index, output, new_tokens=len(sample.token_ids))
                    body = self._frame.around([self._choice(sample) for sample in output.outputs], self.usage.body())
                    body |= self._of_prompt(output) | self._report.keys()
        return body

    async def events(self, generation: Generation) -> Events:
        """The chunks: for each sample its role, then one a token."""
        reports = StreamUsage.of(self._request)
        async with generation:
            async for index, output in generation:
                if output.finished:
                    self._report.see(output)
                for sample in output.outputs:
                    if sample.index in self._ended or not (sample.token_ids or sample.finished()):
                        continue
                    if sample.index not in self._begun:
                        self._begun.add(sample.index)
                        role = self._chunk(sample.index, {"role": "assistant", "content": self._echo})
                        self.usage.see(index, output, new_tokens=0)
                        yield self._event(role, reports, self._of_prompt(output))
                    self.usage.see(index, output, new_tokens=len(sample.token_ids))
                    if sample.finished():
                        self._ended.add(sample.index)
                    yield self._event(self._delta(sample), reports)
        if reports.at_end or self._report.wanted:
            yield self._frame.event([], self.usage.body() if reports.at_end else None, self._report.keys())

    def _event(self, choice: dict[str, Any], reports: StreamUsage, more: dict[str, Any] | None = None) -> bytes:
        return self._frame.event([choice], self.usage.body() if reports.always else None, more)

    def _choice(self, sample: CompletionOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": self._echo + sample.text, "tool_calls": [], "refusal": None}
        reason = sample.finish_reason
        if self._tools is not None:
            parser = self._tools.parser()
            news = _delta_of([*parser.push(sample.text), *parser.finish()])
            calls = [{key: call[key] for key in call if key != "index"} for call in news.get("tool_calls", ())]
            content = self._echo + news.get("content", "")
            message |= {"content": content if content or not calls else None, "tool_calls": calls}
            reason = self._tools.finish_reason(reason, parser)
        choice = {
            "index": sample.index,
            "message": message,
            "logprobs": self._logprobs_of(sample),
            "finish_reason": reason,
            "stop_reason": sample.stop_reason,
        }
        return choice | self._ids_of(sample)

    def _delta(self, sample: CompletionOutput) -> dict[str, Any]:
        delta, reason = {"content": sample.text}, sample.finish_reason
        if self._tools is not None:
            parser = self._parsers.setdefault(sample.index, self._tools.parser())
            pieces = parser.push(sample.text)
            delta = _delta_of([*pieces, *parser.finish()] if sample.finished() else pieces)
            reason = self._tools.finish_reason(reason, parser)
        chunk = self._chunk(sample.index, delta)
        chunk |= {"logprobs": self._logprobs_of(sample), "finish_reason": reason}
        return chunk | {"stop_reason": sample.stop_reason} | self._ids_of(sample)

    @staticmethod
    def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs_of(self, sample: CompletionOutput) -> dict[str, Any] | None:
        return None if sample.logprobs is None else self._logprobs.chat(sample.token_ids, sample.logprobs)

    def _ids_of(self, sample: CompletionOutput) -> dict[str, Any]:
        return {"token_ids": sample.token_ids} if self._request.return_token_ids else {}

    def _of_prompt(self, output: RequestOutput) -> dict[str, Any]:
        """Keys beside the choices, where they were asked for."""
        keys: dict[str, Any] = {}
        if self._request.return_token_ids:
            keys["prompt_token_ids"] = output.prompt_token_ids
        if self._request.prompt_logprobs is not None and output.prompt_logprobs is not None:
            keys["prompt_logprobs"] = self._logprobs.prompt(output.prompt_logprobs)
        return keys


def _delta_of(pieces: Sequence[Piece]) -> dict[str, Any]:
    """News as OpenAI's clients add them up: calls by index, arguments as pieces of text. Empty where there are none."""
    delta: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for kind, text, index in pieces:
        if kind == "content":
            delta["content"] = delta.get("content", "") + text
        elif kind == "call":
            function = {"name": text, "arguments": ""}
            calls.append({"index": index, "id": f"call_{secrets.token_hex(12)}", "type": "function"})
            calls[-1]["function"] = function
        elif calls and calls[-1]["index"] == index:
            calls[-1]["function"]["arguments"] += text
        else:
            calls.append({"index": index, "function": {"arguments": text}})
    return delta | {"tool_calls": calls} if calls else delta
