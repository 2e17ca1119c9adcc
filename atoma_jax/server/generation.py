"""One HTTP request's prompts in the engine: their outputs in one queue, and everything that may end them early.

A deadline, a client that leaves, a shutdown and a lost engine all put an exception into that queue, so that there is
one place where a request ends, and no cancellation to get wrong. Whatever happens, `close` gives every page back.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from atoma_jax import CompletionOutput, EngineDeadError, RequestMetrics, RequestOutput, SamplingParams
from atoma_jax.server.errors import ClientGone, Problem
from atoma_jax.server.prompts import Prompt
from atoma_jax.server.service import Receive, Service, cancel

Item = tuple[int, RequestOutput]  # of the prompt with this index


class Generation:
    """`async with Generation(…) as generation: async for index, output in generation: …`."""

    def __init__(
        self,
        service: Service,
        receive: Receive,
        name: str,
        prompts: Sequence[Prompt],
        params: SamplingParams | None,
        *,
        priority: int,
        cache_salt: str | None,
        traceparent: str | None = None,
    ):
        """`name` must be unique; `receive` is ASGI's, and brings nothing more than the client's leaving. Without
        `params` the prompts become vectors."""
        self._traceparent = traceparent
        self._service, self._receive, self._llm = service, receive, service.llm
        self._ids = [f"{name}-{index}" for index in range(len(prompts))]
        self._prompts, self._params = prompts, params
        self._priority, self._cache_salt = priority, cache_salt
        self._queue: asyncio.Queue[Item | Exception] = asyncio.Queue()
        self._left = set(range(len(prompts)))  # not finished
        self._times: dict[int, RequestMetrics] = {}  # of those that the engine has taken
        self._timers: list[asyncio.TimerHandle] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Generation":
        """Begins to queue the prompts. Whether they could be is heard of in the iteration, like all else."""
        loop, settings = asyncio.get_running_loop(), self._service.settings
        self._service.in_flight.add(self)
        self._timers = [
            loop.call_later(settings.queue_timeout, self._check_queue),
            loop.call_later(settings.request_timeout, self.stop, self._late()),
        ]
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._submit())]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> Item:
        """The next output of any prompt.

        Raises:
            UserError: a prompt or parameter is outside the engine's limits.
            Overloaded: its queue is full; no prompt of this request is served then.
            Problem: a deadline passed, the server shuts down, or a computation gave no finite numbers.
            ClientGone: nobody waits for the answer.
            EngineDeadError: a step failed.
        """
        if not self._left and self._queue.empty():
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        index, output = item
        if output.finished:
            self._left.discard(index)
            self._service.metrics.add_request(output, self._params)
            if self._service.tracing is not None:
                self._service.tracing.add_request(output, self._params, self._traceparent)
        for sample in output.outputs:
            if sample.finish_reason == "error":
                raise _failed(sample)
        return item

    def stop(self, error: Exception) -> None:
        """Ends the request with an error, at its next output at the latest."""
        self._queue.put_nowait(error)

    async def close(self) -> None:
        """Aborts what is unfinished; its pages are free before the next step."""
        self._service.in_flight.discard(self)
        for timer in self._timers:
            timer.cancel()
        await cancel(*self._tasks)
        for index in self._left & self._times.keys():
            self._service.metrics.count_finished("abort")
            with suppress(EngineDeadError):
                await self._llm.abort(self._ids[index])
        self._left.clear()

    async def _submit(self) -> None:
        try:
            for index, prompt in enumerate(self._prompts):
                self._times[index] = await self._llm.submit(
                    {"prompt": prompt.text, "prompt_token_ids": prompt.ids},
                    self._params,
                    self._ids[index],
                    partial(self._take, index),
                    priority=self._priority,
                    cache_salt=self._cache_salt,
                    embeds=self._params is None,
                )
        except Exception as error:
            self.stop(error)

    def _take(self, index: int, item: RequestOutput | EngineDeadError) -> None:
        self._queue.put_nowait(item if isinstance(item, EngineDeadError) else (index, item))

    def _check_queue(self) -> None:
        """Requests whose first step has not come by now are given up; a request of several prompts as a whole."""
        waits = any(times.first_scheduled_time is None for times in self._times.values())
        if waits or len(self._times) < len(self._ids):
            self._service.metrics.count_rejection("queue_timeout")
            seconds = self._service.settings.queue_timeout
            problem = f"No step had room for this request within {seconds:g} s (--queue-timeout)."
            self.stop(Problem(503, problem, retry_after=seconds))

    def _late(self) -> Problem:
        seconds = self._service.settings.request_timeout
        return Problem(504, f"The request took longer than {seconds:g} s (--request-timeout).")

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.stop(ClientGone("The client closed its connection."))


def _failed(sample: CompletionOutput) -> Problem:
    if isinstance(sample.stop_reason, str):  # what the request asks for has no way out
        return Problem(400, f"structured_outputs: {sample.stop_reason}.", param="structured_outputs")
    return Problem(
        500,
        "The model's numbers were not finite for this request, or its rules left no token; others are not concerned.",
    )
