"""The server as a process: the socket, the engine's start beside it, signals, and what the process ends with.

The port is open while the model loads, so that probes get an answer. A first SIGTERM or SIGINT lets what is in flight
finish, a second one ends it.
"""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from atoma_jax import AsyncLLM, EngineConfig, UserError, follow
from atoma_jax.server.app import build_app
from atoma_jax.server.logs import use_json_logs
from atoma_jax.server.service import Service, cancel
from atoma_jax.server.settings import ServerConfig

EXIT_FAILED = 1
_TICK = 0.5  # seconds between looks at the engine
_LAST_WORDS = 2.0  # seconds that a lost engine leaves to the answers which say so
_STATS_EVERY = 10.0  # seconds
_BACKLOG = 2048

_log = logging.getLogger(__name__)

Start = Callable[[], AsyncLLM]


def serve_forever(config: EngineConfig, settings: ServerConfig) -> int:
    """Serves until a signal; returns the exit code.

    Raises:
        UserError: the model, a setting, the address or the chat template cannot be used.
        DownloadError: the model could not be fetched.
    """
    if _follow(config):
        return 0
    template = _read_template(settings.chat_template)
    service = Service(config, settings, chat_template=template)
    listener = listen(settings)
    use_json_logs()

    def start() -> AsyncLLM:
        return AsyncLLM.from_config(config, on_phase=_log_phase)

    process = Process(service, listener, start)
    try:
        return asyncio.run(process.run())
    finally:
        listener.close()
        if settings.uds is not None:
            Path(settings.uds).unlink(missing_ok=True)
        if process.is_loading:  # XLA's threads cannot be stopped, and must not meet a half-closed interpreter
            logging.shutdown()
            os._exit(EXIT_FAILED if process.error is not None else 0)


def _follow(config: EngineConfig) -> bool:
    """What a process does that is not the first of several. The first one is told by the same signals to let requests
    finish, and then tells this one: so a first signal is left to it."""
    if config.mesh.coordinator_address is None or config.mesh.process_id == 0:
        return False
    use_json_logs()

    def first(number: int, _frame: object) -> None:
        _log.info("signal", extra={"fields": {"left_to": "process 0"}})
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, first) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return follow(config, on_phase=_log_phase)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Process:
    """One run of the server."""

    def __init__(self, service: Service, listener: socket.socket, start: Start):
        """`start` builds the engine, in a thread of its own."""
        self._service, self._listener, self._start = service, listener, start
        self._signals = 0
        self._signalled = asyncio.Event()
        self._loader = threading.Thread(target=self._load, name="start", daemon=True)
        self._loaded: asyncio.Future[AsyncLLM] | None = None
        self.error: Exception | None = None

    @property
    def is_loading(self) -> bool:
        """Whether the engine's start still runs."""
        return self._loader.is_alive()

    async def run(self) -> int:
        """Serves until the end; returns the exit code, or raises what the engine's start did."""
        loop = asyncio.get_running_loop()
        self._loaded = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        server = _Server(_uvicorn_config(self._service))
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        self._loader.start()
        watching = asyncio.create_task(self._until_the_end())
        try:
            await asyncio.wait((serving, watching), return_when=asyncio.FIRST_COMPLETED)
            code = watching.result() if watching.done() else EXIT_FAILED
            self._service.stop_all()
            server.should_exit = True
            await serving
        finally:
            await cancel(watching, serving)
            if not self.is_loading:
                await asyncio.to_thread(self._service.close)
        if self.error is not None:
            raise self.error
        return code

    async def _until_the_end(self) -> int:
        """Waits for the engine, then for a signal or the engine's end; returns the exit code."""
        assert self._loaded is not None
        signalled = asyncio.create_task(self._signalled.wait())
        await asyncio.wait((self._loaded, signalled), return_when=asyncio.FIRST_COMPLETED)
        if not self._loaded.done():
            self._service.drain()
            return 0
        try:
            self._service.start(self._loaded.result())
        except Exception as error:
            self.error = error
            return EXIT_FAILED
        _log.info("ready", extra={"fields": {"address": _address(self._listener), "models": self._service.model_names}})
        reporting = asyncio.create_task(self._report())
        try:
            while not self._signalled.is_set():
                if self._service.health == "dead":
                    _log.critical("the engine is lost")
                    await asyncio.sleep(_LAST_WORDS)
                    return EXIT_FAILED
                await asyncio.wait((signalled,), timeout=_TICK)
            return await self._drain()
        finally:
            await cancel(reporting, signalled)

    async def _drain(self) -> int:
        """Lets what is in flight finish, until the deadline or a second signal."""
        settings = self._service.settings
        self._service.drain()
        _log.info("draining", extra={"fields": {"in_flight": len(self._service.in_flight)}})
        loop = asyncio.get_running_loop()
        deadline = loop.time() + settings.drain_timeout
        while self._service.responses and loop.time() < deadline and self._signals < 2:
            if self._service.health == "dead":
                return EXIT_FAILED
            await asyncio.sleep(0.05)
        if self._service.in_flight:
            _log.warning("requests are ended", extra={"fields": {"in_flight": len(self._service.in_flight)}})
        return 0

    async def _report(self) -> None:
        """A line every ten seconds in which steps ran."""
        before = None
        while self._service.settings.log_stats:
            await asyncio.sleep(_STATS_EVERY)
            if self._service.health == "dead":
                return
            stats = await self._service.metrics.read_engine()
            if stats is not None and before is not None and stats.steps != before.steps:
                fields = {
                    "running": stats.num_running,
                    "waiting": stats.num_waiting,
                    "kv_usage": round(stats.kv_usage, 4),
                    "prompt_tokens_per_s": (stats.prompt_tokens - before.prompt_tokens) / _STATS_EVERY,
                    "generation_tokens_per_s": (stats.generation_tokens - before.generation_tokens) / _STATS_EVERY,
                }
                _log.info("stats", extra={"fields": fields})
            before = stats

    def _on_signal(self) -> None:
        self._signals += 1
        self._signalled.set()

    def _load(self) -> None:
        """In a thread: builds the engine and tells the loop."""
        assert self._loaded is not None
        loop, loaded = self._loaded.get_loop(), self._loaded
        try:
            llm = self._start()
        except Exception as error:
            _tell(loop, loaded.set_exception, error)
        else:
            _tell(loop, loaded.set_result, llm)


def _tell(loop: asyncio.AbstractEventLoop, settle: Callable[[Any], None], value: Any) -> None:
    try:
        loop.call_soon_threadsafe(settle, value)
    except RuntimeError:  # the process is ending already
        return


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: they close the port at once."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leaves signals alone."""
        yield


class _BoundedProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection which is silent before its first request is whole."""

    header_timeout = 20.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A client connected."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(self.header_timeout, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """A client is gone."""
        self._deadline.cancel()
        super().connection_lost(exc)

    def _too_slow(self) -> None:
        if self.scope is None and not self.transport.is_closing():  # pyright: ignore[reportUnnecessaryComparison]
            self.send_400_response("The headers took too long (--header-timeout).")


def _uvicorn_config(service: Service) -> uvicorn.Config:
    settings = service.settings
    protocol = type("BoundedProtocol", (_BoundedProtocol,), {"header_timeout": settings.header_timeout})
    return uvicorn.Config(
        build_app(service),
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_keep_alive=settings.keep_alive_timeout,  # pyright: ignore[reportArgumentType]  # for `call_later`
        timeout_graceful_shutdown=5,
    )


def listen(settings: ServerConfig) -> socket.socket:
    """The one socket, bound before anything is loaded. Raises `UserError` where that cannot be."""
    if settings.uds is not None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        where, value, address = "uds", settings.uds, settings.uds
    else:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        where, value, address = "port", settings.port, (settings.host, settings.port)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(where, value, f"cannot be listened on at {settings.host}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def _address(listener: socket.socket) -> str:
    name = listener.getsockname()
    return name if isinstance(name, str) else f"http://{name[0]}:{name[1]}"


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("chat_template", path, f"cannot be read: {error}") from error


def _log_phase(name: str, seconds: float) -> None:
    _log.info("start", extra={"fields": {"phase": name, "seconds": round(seconds, 3)}})
