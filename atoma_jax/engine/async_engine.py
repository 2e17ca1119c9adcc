"""`AsyncLLM`: one engine for many asyncio tasks. The engine runs in a thread of its own, which sleeps while idle."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax

from atoma_jax.config import EngineConfig
from atoma_jax.engine.engine import EMBEDS, Engine, Prompt
from atoma_jax.engine.grammars import COMPILE_SECONDS
from atoma_jax.engine.startup import OnPhase, StartupReport, follow, start_engine
from atoma_jax.engine.stats import EngineStats
from atoma_jax.errors import EngineDeadError, ParameterError
from atoma_jax.outputs import RequestMetrics, RequestOutput
from atoma_jax.sampling_params import SamplingParams
from atoma_jax.structured_outputs import StructuredOutputsParams
from atoma_jax.tokenizer import Tokenizer

Item = RequestOutput | EngineDeadError
Deliver = Callable[[Item], object]  # takes an output, or the error that ends them all

_T = TypeVar("_T")
_COMPILERS = 4  # grammars that are compiled at once


@dataclass(frozen=True, slots=True, eq=False)
class _Stream:
    """Where the outputs of one request go: to a callback, in the loop that asked."""

    loop: asyncio.AbstractEventLoop
    deliver: Deliver


class AsyncLLM:
    """Serves many requests at once.

    A request is handed over in `generate` and comes back as an async iterator. Cancelling the iterator aborts it.
    `submit` is what lies below it, for who joins the outputs of several requests.
    """

    def __init__(self, engine: Engine, startup: StartupReport):
        """Use `from_config`."""
        self.startup = startup
        self._engine = engine
        self._streams: dict[str, _Stream] = {}
        self._calls: deque[Callable[[], None]] = deque()  # what the engine's thread is to do between steps
        self._wake = threading.Condition()
        self._closing = False
        self._compilers = ThreadPoolExecutor(_COMPILERS, thread_name_prefix="grammars")
        self._busy_since: float | None = None
        self._error: EngineDeadError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        engine.when_lost(self._on_lost)

    @classmethod
    def from_config(cls, config: EngineConfig, *, on_phase: OnPhase | None = None) -> "AsyncLLM":
        """Loads and compiles; arguments and errors as in `LLM.from_config`."""
        if follow(config, on_phase=on_phase):
            raise SystemExit(0)
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

    @property
    def busy_seconds(self) -> float:
        """Seconds that the engine's thread has been at its present step; 0 while it waits for work.

        A number far above what a step takes means that the device hangs.
        """
        since = self._busy_since
        return 0.0 if since is None else time.perf_counter() - since

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
        queue: asyncio.Queue[Item] = asyncio.Queue()
        deliver = queue.put_nowait
        await self.submit(prompt, sampling_params, request_id, deliver, priority=priority, cache_salt=cache_salt)
        finished = False
        try:
            while not finished:
                item = await queue.get()
                if isinstance(item, EngineDeadError):
                    finished = True
                    raise item
                finished = item.finished
                yield item
        finally:
            if not finished:
                self._leave(request_id, deliver)

    async def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        request_id: str,
        deliver: Deliver,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        embeds: bool = False,
    ) -> RequestMetrics:
        """Hands a request over, and returns once the engine has queued it.

        Whoever is not interested any more calls `abort`. Cancelling this call does so by itself.

        Args:
            prompt: as in `generate`, like all that is not named here.
            sampling_params: see there.
            request_id: see there.
            deliver: called in this task's loop with each output up to the finished one, or with `EngineDeadError`.
            priority: see there.
            cache_salt: see there.
            embeds: a vector is asked for (`RequestOutput.embedding`), without `sampling_params`.

        Returns:
            The request's times, which the engine goes on filling in.

        Raises:
            ParameterError: as in `generate`, like the others.
        """
        loop = asyncio.get_running_loop()
        stream = _Stream(loop, deliver)
        params = self._engine.default_params if sampling_params is None else sampling_params
        params = EMBEDS if embeds else params

        if params.structured_outputs is not None:
            await self._compile(params.structured_outputs)

        def add() -> RequestMetrics:
            metrics = self._engine.add_request(
                request_id, prompt, params, priority=priority, cache_salt=cache_salt, embeds=embeds
            )
            self._streams[request_id] = stream
            return metrics

        try:
            return await self._ask(add)
        except asyncio.CancelledError:
            self._leave(request_id, deliver)
            raise

    async def abort(self, request_id: str) -> None:
        """Ends a request; its iterator gets what there is, with finish reason "abort"."""

        def abort() -> None:
            output = self._engine.abort_request(request_id)
            if output is not None:
                self._hand_out([output])

        self._call(abort)

    async def check_health(self) -> None:
        """Raises `EngineDeadError` if the engine is lost."""
        if self._error is not None:
            raise self._error

    async def stats(self) -> EngineStats:
        """Times and counters since the start."""
        return await self._ask(self._engine.stats)

    async def reset_prefix_cache(self) -> None:
        """Forgets all shared prefixes."""
        await self._ask(self._engine.reset_prefix_cache)

    async def start_profile(self, folder: str) -> None:
        """Begins to record what host and device do, for TensorBoard or Perfetto.

        Raises:
            RuntimeError: a recording is under way.
        """
        await self._ask(partial(jax.profiler.start_trace, folder))

    async def stop_profile(self) -> None:
        """Ends the recording and writes it. No step runs meanwhile.

        Raises:
            RuntimeError: there is no recording.
        """
        await self._ask(jax.profiler.stop_trace)

    def shutdown(self) -> None:
        """Aborts what is unfinished, whose iterators raise `EngineDeadError`, and gives the device's memory back."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._thread.join()

    def _on_lost(self) -> None:
        """Another process is lost: an idle engine must not wait for a request to find out."""
        with suppress(EngineDeadError):
            self._call(self._engine.check)

    def _call(self, call: Callable[[], None]) -> None:
        """Has the engine's thread do something between two steps."""
        with self._wake:
            if self._error is not None:
                raise self._error
            if self._closing:
                raise EngineDeadError("The engine was shut down.")
            self._calls.append(call)
            self._wake.notify()

    async def _ask(self, call: Callable[[], _T]) -> _T:
        """The same, and waits for what comes of it."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_T] = loop.create_future()

        def ask() -> None:
            try:
                result = call()
            except Exception as error:
                _post(loop, partial(_settle, answer, answer.set_exception, error))
            else:
                _post(loop, partial(_settle, answer, answer.set_result, result))

        self._call(ask)
        return await answer

    async def _compile(self, wanted: StructuredOutputsParams) -> None:
        """Compiles a grammar beside the loop and the engine's thread, which will find it in the cache.

        Raises:
            ParameterError: it is not valid, or takes too long.
        """
        loop, grammars = asyncio.get_running_loop(), self._engine.grammars
        if not grammars.is_ready:
            await loop.run_in_executor(self._compilers, grammars.prepare)
        try:
            async with asyncio.timeout(COMPILE_SECONDS):
                await loop.run_in_executor(self._compilers, grammars.compile, wanted)
        except TimeoutError:
            problem = f"{wanted.field} could not be compiled within {COMPILE_SECONDS:g} s: make it simpler."
            raise ParameterError(wanted.field, wanted.kind, problem) from None

    def _leave(self, request_id: str, deliver: Deliver) -> None:
        """Aborts a request of which nothing more is to be delivered."""

        def drop() -> None:
            stream = self._streams.get(request_id)
            if stream is not None and stream.deliver is deliver:  # an id may be in use again by now
                del self._streams[request_id]
                self._engine.abort_request(request_id)

        with suppress(EngineDeadError):  # it has dropped everything by itself
            self._call(drop)

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
        self._busy_since = None
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._calls or self._engine.has_work)
            if self._closing:
                return False
            count = len(self._calls)
        self._busy_since = time.perf_counter()
        for _ in range(count):  # one that raises leaves those behind it to `_die`
            self._calls.popleft()()
        self._hand_out(self._engine.step())
        return True

    def _hand_out(self, outputs: Iterable[RequestOutput]) -> None:
        """One message to each loop, however many of its requests have news: waking a loop costs more than a row."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Deliver, RequestOutput]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                by_loop.setdefault(stream.loop, []).append((stream.deliver, output))
                if output.finished:
                    del self._streams[output.request_id]
        for loop, news in by_loop.items():
            _post(loop, partial(_deliver_all, news))

    def _die(self, error: EngineDeadError) -> None:
        with self._wake:
            self._error = error
            calls, self._calls = self._calls, deque()
        for call in calls:  # additions come back with the engine's own error
            with suppress(EngineDeadError):  # a loss that is noticed a second time
                call()
        for stream in self._streams.values():
            _post(stream.loop, partial(stream.deliver, error))
        self._streams.clear()
        self._busy_since = None


def _post(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    """Has a loop call something; one that was closed meanwhile has nobody who waits."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call)


def _settle(answer: "asyncio.Future[Any]", settle: Callable[[Any], None], value: Any) -> None:
    if not answer.done():  # whoever asked may have been cancelled
        settle(value)


def _deliver_all(news: Iterable[tuple[Deliver, RequestOutput]]) -> None:
    for deliver, output in news:
        deliver(output)
