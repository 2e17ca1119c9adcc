"""The server's state: the engine once it is there, which phase the server is in, and the requests in flight."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

from atoma_jax import AsyncLLM, EngineConfig, __version__
from atoma_jax.server.errors import Problem
from atoma_jax.server.metrics import Metrics
from atoma_jax.server.prompts import PromptReader
from atoma_jax.server.settings import ServerConfig
from atoma_jax.server.tracing import Tracing

Phase = Literal["loading", "ready", "draining"]
Health = Literal["loading", "ready", "draining", "stalled", "dead"]

_WORKERS = 2  # threads that render templates and cut texts
_T = TypeVar("_T")


class InFlight(Protocol):
    """A request that can be ended from outside."""

    def stop(self, error: Exception) -> None:
        """Ends it with an error."""
        ...


class Service:
    """One model behind one port."""

    def __init__(self, config: EngineConfig, settings: ServerConfig, *, chat_template: str | None = None):
        """`chat_template` is the source of a template instead of the model's.

        Raises:
            UserError: traces are asked for, and the extra for them is not installed.
        """
        self.config, self.settings = config, settings
        self.created = int(time.time())
        self.model_names = settings.served_model_name or (config.model.model,)
        self.metrics = Metrics(self.model_names[0])
        endpoint = settings.otlp_traces_endpoint
        self.tracing = None if endpoint is None else Tracing.to_endpoint(endpoint, self.model_names[0])
        self.in_flight: set[InFlight] = set()
        self.responses = 0  # requests of any kind that are being answered
        self._chat_template = chat_template
        self._phase: Phase = "loading"
        self._llm: AsyncLLM | None = None
        self._prompts: PromptReader | None = None
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="prompts")
        self._salt_key = secrets.token_bytes(16)
        self.fingerprint = ""

    def start(self, llm: AsyncLLM) -> None:
        """The engine is there: requests are taken from now on.

        Raises:
            UserError: the chat template is not valid.
        """
        self._llm = llm
        self._prompts = PromptReader(llm, self.settings, self._chat_template)
        self.fingerprint = _fingerprint(llm, self.config)
        self.metrics.start(llm, self.config)
        if self._phase == "loading":
            self._phase = "ready"

    def drain(self) -> None:
        """No further request is taken; those in flight go on."""
        self._phase = "draining"

    def stop_all(self) -> None:
        """Ends every request in flight."""
        for request in list(self.in_flight):
            request.stop(Problem(503, "The server is shutting down.", retry_after=1.0))

    def close(self) -> None:
        """Gives threads and the engine back."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        if self.tracing is not None:
            self.tracing.close()
        if self._llm is not None:
            self._llm.shutdown()

    @property
    def health(self) -> Health:
        """How the server is, the worst first."""
        if self._llm is None:
            return self._phase
        if self._llm.is_dead:
            return "dead"
        if self._llm.busy_seconds > self.settings.stall_timeout:
            return "stalled"
        return self._phase

    @property
    def llm(self) -> AsyncLLM:
        """The engine, for a new request. Raises `Problem` (503) where none can be taken."""
        health = self.health
        if self._llm is None or health in ("loading", "draining", "dead"):
            problem = {"loading": "The model is being loaded.", "draining": "The server is shutting down."}
            raise Problem(503, problem.get(health, "The engine is lost."), retry_after=5.0)
        return self._llm

    @property
    def prompts(self) -> PromptReader:
        """What reads prompts. Raises as `llm`."""
        assert self.llm is self._llm
        assert self._prompts is not None
        return self._prompts

    def check_model(self, name: str | None) -> str:
        """The model's name for the answer. Raises `Problem` (404) for another one's."""
        if name is None or name == "":
            return self.model_names[0]
        if name not in self.model_names:
            served = ", ".join(self.model_names)
            problem = f"model: there is no model {name[:100]!r} here, only {served} (--served-model-name)."
            raise Problem(404, problem, param="model")
        return name

    @staticmethod
    def new_name() -> str:
        """An engine's request id that no client can know or choose."""
        return secrets.token_hex(16)

    def cache_salt(self, key: str | None, asked: str | None) -> str | None:
        """What keeps prefixes apart: callers with different keys never share any, whatever salt they choose."""
        if key is None:
            return asked
        mark = hashlib.blake2b(key.encode(), key=self._salt_key, digest_size=16).hexdigest()
        return f"{mark}:{asked or ''}"

    async def in_worker(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """Runs what takes long beside the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, partial(work, *arguments))


def _fingerprint(llm: AsyncLLM, config: EngineConfig) -> str:
    """Of what decides an answer's bits: program, weights, arithmetic, mesh and the shapes of steps.

    The model's name and what only decides how much fits are left out.
    """
    model = replace(config.model, model="-", revision=None)
    start, limits = llm.startup, llm.model_config
    sizes = (limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_model_len, limits.page_size)
    parts = (__version__, start.content, start.kernels, start.mesh, model, config.cache.kv_cache_dtype, sizes)
    text = repr((*parts, config.compile.deterministic))
    return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:16]


async def cancel(*tasks: "asyncio.Task[Any]") -> None:
    """Ends tasks and waits until they have."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


Receive = Callable[[], Awaitable[Any]]  # of ASGI
