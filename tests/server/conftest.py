"""A server over a tiny model, within the process: programs are those of the engine's tests, and shared by all."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from atoma_jax import LLM, AsyncLLM, EngineConfig
from atoma_jax.engine.engine import Engine
from atoma_jax.server.app import build_app
from atoma_jax.server.run import Process, listen
from atoma_jax.server.service import Service
from atoma_jax.server.settings import ServerConfig
from tests.engine import conftest as engine_fixtures
from tests.engine.inside import BorrowedRunner, FailingRunner, drained

BUCKETS, SIZES = engine_fixtures.BUCKETS, engine_fixtures.SIZES
tiny_path = engine_fixtures.tiny_path
shared_llm = engine_fixtures.shared_llm
llm = engine_fixtures.llm
make_engine = engine_fixtures.make_engine

Message = dict[str, Any]

# The shapes of `shared_llm` and JAX's own settings of this suite: what a program compiles is in the cache by then.
PROGRAM_SETTINGS = f"""
[model]
max_model_len = {SIZES["max_model_len"]}
[cache]
block_size = {SIZES["block_size"]}
num_pages = {SIZES["num_pages"]}
[scheduler]
max_num_seqs = {SIZES["max_num_seqs"]}
max_num_batched_tokens = {SIZES["max_num_batched_tokens"]}
[compile]
decode_rows = {[*BUCKETS["decode_rows"]]}
prefill_tokens = {[*BUCKETS["prefill_tokens"]]}
score_tokens = {SIZES["score_tokens"]}
"""
JAX_AS_HERE = {
    "JAX_PLATFORMS": "cpu",
    # A limit, like that of the suite: without one JAX neither locks the folder nor writes what limits go by.
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2 << 30),
}


@dataclass
class Served:
    """A server in this process, and its client."""

    service: Service
    app: FastAPI
    llm: AsyncLLM
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def engine(self) -> Engine:
        return self.llm._engine

    def client(self) -> httpx2.AsyncClient:
        transport = httpx2.ASGITransport(app=self.app)
        return httpx2.AsyncClient(transport=transport, base_url="http://test", headers=self.headers)

    def call(self, method: str, path: str, **arguments: Any) -> httpx2.Response:
        """One request, in a loop of its own."""

        async def main() -> httpx2.Response:
            async with self.client() as client:
                response = await client.request(method, path, **arguments)
            await self.idle()
            return response

        return asyncio.run(main())

    def post(self, path: str, body: Any = None, **arguments: Any) -> httpx2.Response:
        return self.call("POST", path, json=body, **arguments)

    def get(self, path: str, **arguments: Any) -> httpx2.Response:
        return self.call("GET", path, **arguments)

    def complete(self, **body: Any) -> dict[str, Any]:
        """A completion that must succeed."""
        response = self.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, content: Any = "Hi", **body: Any) -> dict[str, Any]:
        """An answer that must come."""
        response = self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **body})
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        """The error object of a request that must fail."""
        response = self.post(path, body)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == status
        return error

    async def idle(self) -> None:
        """Waits until the engine has nothing left, then asserts that it holds nothing."""
        while self.engine.has_work and not self.llm.is_dead:
            await asyncio.sleep(0.001)
        if not self.llm.is_dead:
            await self.llm.stats()  # whatever was asked before is done by now
            drained(self.engine)
        assert not self.service.in_flight


Serve = Callable[..., Served]


@pytest.fixture
def serve(llm: LLM, make_engine: Callable[..., Engine]) -> Iterator[Serve]:
    """`serve(fails_at=3, limits={"max_num_seqs": 1}, max_body_bytes=100)`: a server over a new engine."""
    made: list[Served] = []

    def build(
        *,
        fails_at: int | None = None,
        limits: dict[str, Any] | None = None,
        template: str | None = None,
        **settings: Any,
    ) -> Served:
        engine = make_engine(llm, **(limits or {}))
        device = engine._runner
        engine._runner = (
            BorrowedRunner(device) if fails_at is None else FailingRunner(device, launches=fails_at, at_read=True)
        )
        config = EngineConfig.from_options({"model": "tiny"})
        service = Service(config, ServerConfig(**settings), chat_template=template)
        app = build_app(service)
        served = Served(service, app, AsyncLLM(engine, llm.startup))
        service.start(served.llm)
        made.append(served)
        return served

    yield build
    for served in made:
        served.service.close()


@pytest.fixture
def server(serve: Serve) -> Served:
    """One with the settings of a user who sets none."""
    return serve()


@dataclass
class Wire:
    """A connection spoken to in ASGI's own words, so that a test decides when the client leaves or stops to read."""

    sent: list[Message] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    reads: asyncio.Event = field(default_factory=asyncio.Event)
    task: "asyncio.Task[None] | None" = None

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.001)

    async def finish(self) -> None:
        assert self.task is not None
        await asyncio.wait_for(self.task, 20)


@asynccontextmanager
async def connected(
    app: FastAPI, path: str, chunks: list[bytes], *, headers: dict[str, str] | None = None, more: bool = False
) -> AsyncIterator[Wire]:
    """Sends a POST in chunks; `more` leaves its body open."""
    wire = Wire()
    wire.reads.set()
    left = list(chunks)

    async def receive() -> Message:
        if left:
            chunk = left.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(left) or more}
        await wire.gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await wire.reads.wait()
        wire.sent.append(message)

    raw = {"host": "test", "content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in raw.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {},
    }
    call: Awaitable[None] = app(scope, receive, send)
    wire.task = asyncio.ensure_future(call)
    try:
        yield wire
    finally:
        wire.gone.set()
        wire.reads.set()
        await asyncio.wait((wire.task,), timeout=20)


@dataclass
class Program:
    """The program itself, in a process group of its own."""

    process: subprocess.Popen[bytes]
    log: Path
    address: str = ""

    def ready(self) -> "Program":
        self.address = _address(self.process, self.log)
        return self

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def end(self) -> None:
        """By SIGTERM, which it must heed."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(20) == 0, self.log.read_text()


@contextmanager
def program(model: Path, folder: Path, cache: Path, *flags: str, num_devices: int = 8) -> Iterator[Program]:
    """`atoma-jax serve` with the engine of the tests within the process, and as many devices. Killed at the end if it
    still runs."""
    (folder / "serve.toml").write_text(PROGRAM_SETTINGS)
    log = folder / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "atoma_jax.cli", "serve", str(model), "--port", "0"),
                *("--config", str(folder / "serve.toml"), "--served-model-name", "tiny"),
                *("--compile-cache-dir", str(cache)),
                *("--dtype", "float32", "--cpu-precision", SIZES["cpu_precision"]),  # as the engine within the tests
                *flags,
            ],
            stderr=stderr,
            start_new_session=True,
            env={**os.environ, **JAX_AS_HERE, "JAX_NUM_CPU_DEVICES": str(num_devices)},
        )
    try:
        yield Program(process, log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def live(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[str]:
    """The program itself, its address; ended by SIGTERM."""
    cache = request.config.cache.mkdir("xla")
    with program(tiny_path, tmp_path_factory.mktemp("live"), cache, "--api-key", "secret") as running:
        yield running.ready().address
        httpx2.get(f"{running.address}/version").raise_for_status()  # also where no test asked anything
        running.end()
        assert {line["message"] for line in running.lines} >= {"start", "ready", "request", "draining"}


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            if '"ready"' in line:
                return json.loads(line)["address"]
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@dataclass
class Here:
    """A server's process within this one."""

    service: Service
    process: Process
    engine: Engine
    url: str

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.002)

    async def ready(self) -> None:
        await self.until(lambda: self.service.health == "ready")


@pytest.fixture
def here(llm: LLM, make_engine: Callable[..., Engine]) -> Iterator[Callable[..., Here]]:
    """`here(start=…, slow=0.01, drain_timeout=1.0)`; `slow` is how many seconds longer a step takes."""
    sockets: list[socket.socket] = []

    def build(
        *, fails_at: int | None = None, slow: float = 0.0, start: Callable[[], Any] = lambda: None, **settings: Any
    ) -> Here:
        engine = make_engine(llm)
        device = engine._runner
        engine._runner = (
            BorrowedRunner(device) if fails_at is None else FailingRunner(device, launches=fails_at, at_read=True)
        )
        step = engine.step

        def slowly() -> Any:
            time.sleep(slow)
            return step()

        engine.step = slowly

        def load() -> AsyncLLM:
            start()
            return AsyncLLM(engine, llm.startup)

        chosen = ServerConfig(port=0, **settings)
        listener = listen(chosen)
        sockets.append(listener)
        service = Service(EngineConfig.from_options({"model": "tiny"}), chosen)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        return Here(service, Process(service, listener, load), engine, url)

    yield build
    for listener in sockets:
        listener.close()
