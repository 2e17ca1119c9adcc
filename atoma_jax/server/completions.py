"""Answers of `/v1/completions`: choice `p * n + i` is sample i of prompt p, whole or as a stream of chunks."""

from collections.abc import Sequence
from typing import Any

from atoma_jax import AsyncLLM, CompletionOutput, RequestOutput
from atoma_jax.server.answers import Frame, LogprobWriter, Report, StreamUsage, Usage
from atoma_jax.server.generation import Generation
from atoma_jax.server.params import drops_output
from atoma_jax.server.prompts import Prompt
from atoma_jax.server.schemas import CompletionRequest
from atoma_jax.server.stream import Events


class CompletionWriter:
    """Writes the answer to one request."""

    def __init__(
        self, llm: AsyncLLM, request: CompletionRequest, prompts: Sequence[Prompt], frame: Frame, usage: Usage
    ):
        """`usage` is filled in as tokens come."""
        self._request, self._frame, self.usage = request, frame, usage
        self._report = Report(request)
        self._n = 1 if request.n is None else request.n
        self._drops = drops_output(request)
        self._logprobs = LogprobWriter(llm, top=request.logprobs or 0, as_ids=bool(request.return_tokens_as_token_ids))
        tokenizer = llm.get_tokenizer()
        self._echoes = [
            (tokenizer.decode(prompt.ids, skip_special_tokens=False) if prompt.text is None else prompt.text)
            if request.echo
            else ""
            for prompt in prompts
        ]
        self._offsets: dict[int, int] = {}  # by choice: characters of the tokens sent so far
        self._ended: set[int] = set()

    async def answer(self, generation: Generation) -> dict[str, Any]:
        """The whole answer."""
        choices: list[dict[str, Any]] = []
        async with generation:
            async for index, output in generation:
                if output.finished:
                    self._report.see(output)
                    choices += self._news(index, output)
        choices.sort(key=lambda choice: choice["index"])
        return self._frame.around(choices, self.usage.body()) | self._report.keys()

    async def events(self, generation: Generation) -> Events:
        """The chunks, one a token."""
        reports = StreamUsage.of(self._request)
        async with generation:
            async for index, output in generation:
                if output.finished:
                    self._report.see(output)
                for choice in self._news(index, output):
                    yield self._frame.event([choice], self.usage.body() if reports.always else None)
        if reports.at_end or self._report.wanted:
            yield self._frame.event([], self.usage.body() if reports.at_end else None, self._report.keys())

    def _news(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """A choice for each sample that has something new."""
        choices: list[dict[str, Any]] = []
        for sample in output.outputs:
            place = index * self._n + sample.index
            if place in self._ended or not (sample.token_ids or sample.finished()):
                continue
            self.usage.see(index, output, new_tokens=0 if self._drops else len(sample.token_ids))
            choices.append(self._choice(place, index, output, sample))
            if sample.finished():
                self._ended.add(place)
        return choices

    def _choice(self, place: int, index: int, output: RequestOutput, sample: CompletionOutput) -> dict[str, Any]:
        is_first = place not in self._offsets
        text = "" if self._drops else sample.text
        choice: dict[str, Any] = {
            "index": place,
            "text": self._echoes[index] + text if is_first else text,
            "logprobs": self._arrays(place, output, sample, is_first=is_first),
            "finish_reason": "length" if self._drops else sample.finish_reason,
            "stop_reason": None if self._drops else sample.stop_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = [] if self._drops else sample.token_ids
            if is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        if self._request.prompt_logprobs is not None and is_first and output.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._logprobs.prompt(output.prompt_logprobs)
        return choice

    def _arrays(
        self, place: int, output: RequestOutput, sample: CompletionOutput, *, is_first: bool
    ) -> dict[str, Any] | None:
        offset = self._offsets.setdefault(place, 0)
        if self._request.logprobs is None:
            return None
        ids = [] if self._drops else list(sample.token_ids)
        entries = [] if self._drops else list(sample.logprobs or ())
        if self._request.echo and is_first:
            assert output.prompt_logprobs is not None, "echo with logprobs asks for them"
            ids = [*output.prompt_token_ids, *ids]
            entries = [*output.prompt_logprobs, *entries]
        arrays = self._logprobs.completion(ids, entries, offset=offset)
        self._offsets[place] = offset + sum(map(len, arrays["tokens"]))
        return arrays
