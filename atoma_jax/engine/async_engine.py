"""`AsyncLLM`: one engine for many asyncio tasks. The engine runs in a thread of its own, which sleeps while idle."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from atoma_jax.config import EngineConfig
from atoma_jax.engine.engine import Engine, Prompt
from atoma_jax.engine.startup import OnPhase, StartupReport, start_engine
from atoma_jax.engine.stats import EngineStats
from atoma_jax.errors import EngineDeadError
from atoma_jax.outputs import RequestOutput
from atoma_jax.sampling_params import SamplingParams
from atoma_jax.tokenizer import Tokenizer

_Item = RequestOutput | BaseException


@dataclass(slots=True, eq=False)
class _Stream:
    """Where the outputs of one request go: a queue of the loop that asked."""

    loop: asyncio.AbstractEventLoop
    queue: "asyncio.Queue[_Item]" = field(default_factory=lambda: asyncio.Queue[_Item]())

    def put(self, item: _Item) -> None:
        """From the engine's thread."""
        _post(self.loop, lambda: self.queue.put_nowait(item))


class AsyncLLM:
    """Serves many requests at once.

    A request is handed over in `generate` and comes back as an async iterator. Cancelling the iterator aborts it.
    """

    def __init__(self, engine: Engine, startup: StartupReport):
        """Use `from_config`."""
        self.startup = startup
        self._engine = engine
        self._streams: dict[str, _Stream] = {}
        self._calls: deque[Callable[[], None]] = deque()  # what the engine's thread is to do between steps
        self._wake = threading.Condition()
        self._closing = False
        self._error: EngineDeadError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_config(cls, config: EngineConfig, *, on_phase: OnPhase | None = None) -> "AsyncLLM":
        """Loads and compiles; arguments and errors as in `LLM.from_config`."""
        engine, startup = start_engine(config, on_phase=on_phase)
        return cls(engine, startup)

    @classmethod
    def from_options(cls, model: str, **options: Any) -> "AsyncLLM":
        """Loads and compiles from flat settings, as `LLM(model, **options)` does."""
        return cls.from_config(EngineConfig.from_options({"model": model, **options}))

    @property
    def model_config(self) -> Any:
        """The engine's limits; see `EngineLimits`."""
        return self._engine.model_config

    @property
    def is_dead(self) -> bool:
        """Whether a step failed; every later call raises `EngineDeadError`."""
        return self._error is not None

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What requests without parameters get: what the model's makers recommend (generation_config.json)."""
        return self._engine.default_params

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Completes a prompt, output by output.

        Args:
            prompt: text, `{"prompt": text}`, `{"prompt_token_ids": ids}`, or token ids.
            sampling_params: its settings; None: what the model's makers recommend.
            request_id: unique among unfinished requests.
            priority: smaller goes first, under the priority policy.
            cache_salt: prefixes are shared only between requests of equal salt.

        Raises:
            ParameterError: the prompt or a parameter is outside the limits.
            Overloaded: the queue is full.
            EngineDeadError: a step failed, now or before.
        """
        stream = _Stream(asyncio.get_running_loop())
        params = self._engine.default_params if sampling_params is None else sampling_params

        def add() -> None:
            try:
                self._engine.add_request(request_id, prompt, params, priority=priority, cache_salt=cache_salt)
            except Exception as error:
                stream.put(error)
            else:
                self._streams[request_id] = stream

        self._call(add)
        finished = False
        try:
            while not finished:
                item = await stream.queue.get()
                if isinstance(item, BaseException):
                    finished = True
                    raise item
                finished = item.finished
                yield item
        finally:
            if not finished:
                with suppress(EngineDeadError):  # it has dropped everything by itself
                    self._call(lambda: self._drop(request_id, stream))

    async def abort(self, request_id: str) -> None:
        """Ends a request; its iterator gets what there is, with finish reason "abort"."""

        def abort() -> None:
            output = self._engine.abort_request(request_id)
            stream = self._streams.pop(request_id, None)
            if output is not None and stream is not None:
                stream.put(output)

        self._call(abort)

    async def check_health(self) -> None:
        """Raises `EngineDeadError` if the engine is lost."""
        if self._error is not None:
            raise self._error

    async def stats(self) -> EngineStats:
        """Times and counters since the start."""
        loop = asyncio.get_running_loop()
        reading: asyncio.Future[EngineStats] = loop.create_future()

        def read() -> None:
            stats = self._engine.stats()
            _post(loop, lambda: None if reading.done() else reading.set_result(stats))

        self._call(read)
        return await reading

    def shutdown(self) -> None:
        """Aborts what is unfinished, whose iterators raise `EngineDeadError`, and gives the device's memory back."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _call(self, call: Callable[[], None]) -> None:
        with self._wake:
            if self._error is not None:
                raise self._error
            if self._closing:
                raise EngineDeadError("The engine was shut down.")
            self._calls.append(call)
            self._wake.notify()

    def _drop(self, request_id: str, stream: _Stream) -> None:
        if self._streams.get(request_id) is stream:  # an id may be in use again by now
            del self._streams[request_id]
            self._engine.abort_request(request_id)

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self._engine.close()
            error = EngineDeadError("The engine was shut down.")
        except EngineDeadError as lost:
            error = lost
        except Exception as fault:  # whoever waits must hear of it, or waits for ever
            error = EngineDeadError(f"The engine is lost: its thread failed with {type(fault).__name__}: {fault}")
        self._die(error)

    def _turn(self) -> bool:
        """Waits for work and does one step of it; False once the engine is to shut down."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._calls or self._engine.has_work)
            if self._closing:
                return False
            calls, self._calls = self._calls, deque()
        for call in calls:
            call()
        for output in self._engine.step():
            self._hand_out(output)
        return True

    def _hand_out(self, output: RequestOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is not None:
            stream.put(output)
            if output.finished:
                del self._streams[output.request_id]

    def _die(self, error: EngineDeadError) -> None:
        with self._wake:
            self._error = error
            calls, self._calls = self._calls, deque()
        for call in calls:  # additions come back with the engine's own error
            call()
        for stream in self._streams.values():
            stream.put(error)
        self._streams.clear()


def _post(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    """Has a loop call something; one that was closed meanwhile has nobody who waits."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
