"""One model as several replicas behind Ray Serve: `serve run atoma_jax.server.ray_app:build config=FILE`.

A replica is this server without its socket: the application of `app.py` over an engine of its own. The ingress reads
requests and hands them to a replica, which Ray's own prefix-aware router chooses: prompts that begin alike go where
their beginning is cached, others where there is least. Everything else, keys and refusals too, is the replica's answer.
Ray starts a replica anew once its health check fails, and lets it finish what runs before it stops one.

What belongs to one engine (metrics, profiles, the cache's reset) has no meaning through a router and is refused.
"""

# Ray is in no environment of the type checker.
# pyright: reportMissingImports=false

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import serve
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from atoma_jax import AsyncLLM, EngineConfig
from atoma_jax.config import build_section, read_toml
from atoma_jax.errors import ConfigError, EngineDeadError
from atoma_jax.server.app import build_app
from atoma_jax.server.errors import Problem
from atoma_jax.server.service import Service, cancel
from atoma_jax.server.settings import DEFAULT_QUEUE, ServerConfig

# Its public name, ray.serve.llm.request_router, imports vLLM or SGLang.
_ROUTER = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router.PrefixCacheAffinityRouter"
_ROUTED_CHARACTERS = 8192  # of a prompt, that the router looks at
_WAITING_MESSAGES = 16  # of an answer, that the ingress has not taken
_OF_ONE_ENGINE = (
    "/metrics",
    "/load",
    "/start_profile",
    "/stop_profile",
    "/reset_prefix_cache",
    "/docs",
    "/openapi.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """The section `[ray]` of a TOML file."""

    num_replicas: int = 2
    num_cpus: float = 1.0  # that Ray counts for a replica
    num_gpus: float = 0.0
    max_ongoing_requests: int = 2048  # of a replica; its own queue refuses before

    def __post_init__(self) -> None:
        for name in ("num_replicas", "max_ongoing_requests"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")
        for name in ("num_cpus", "num_gpus"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request on its way to a replica. The router reads `prompt`."""

    prompt: str
    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Replica:
    """An engine and the application over it."""

    def __init__(self, config: EngineConfig, settings: ServerConfig):
        """Loads and compiles."""
        self._service = Service(config, settings)
        self._app = build_app(self._service)
        self._service.start(AsyncLLM.from_config(config))

    async def answer(self, call: Call) -> AsyncGenerator[Any, None]:
        """Status and headers, then pieces of the body. Closing it aborts the request."""
        messages: asyncio.Queue[Any] = asyncio.Queue(_WAITING_MESSAGES)
        gone = asyncio.Event()
        whole = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Any:
            if whole:
                return whole.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            await self._app(_scope(call), receive, messages.put)
            await messages.put(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    yield message["status"], list(message["headers"])
                elif message.get("body"):
                    yield message["body"]
        finally:
            gone.set()
            await cancel(task)

    def check_health(self) -> None:
        """Raises `EngineDeadError` where the engine is lost or hangs: Ray then starts another replica."""
        if self._service.health in ("dead", "stalled"):
            raise EngineDeadError(f"The engine is {self._service.health}.")

    def __del__(self) -> None:
        """Ray has let what ran finish."""
        service = getattr(self, "_service", None)  # nothing to close where loading failed
        if service is not None:
            service.close()


class Ingress:
    """Reads requests, within limits, and passes answers on."""

    def __init__(self, replicas: Any, settings: ServerConfig):
        """`replicas` is Ray's handle on them."""
        self._replicas, self._settings = replicas.options(stream=True), settings

    async def __call__(self, request: Request) -> Response:
        """One request."""
        path = request.url.path
        if path in _OF_ONE_ENGINE:
            return Problem(404, f"{path} belongs to one engine, and this address is that of several.").response()
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                body = await self._read(request)
        except Problem as problem:
            return problem.response()
        except (TimeoutError, ClientDisconnect):
            return Problem(408, f"The body took longer than {self._settings.body_timeout:g} s.").response()
        prompt = routing_text(body, request.headers.get("authorization", ""))
        call = Call(
            prompt=prompt,
            method=request.method,
            path=path,
            query=request.url.query.encode(),
            headers=[(name, value) for name, value in request.headers.raw if name != b"transfer-encoding"],
            body=body,
        )
        # The router looks at positional arguments alone: what has no prompt goes to any replica.
        answer = self._replicas.answer.remote(call) if prompt else self._replicas.answer.remote(call=call)
        status, headers = await anext(answer)
        response = StreamingResponse(_pieces(answer), status)
        response.raw_headers = headers
        return response

    async def _read(self, request: Request) -> bytes:
        body, limit = bytearray(), self._settings.max_body_bytes
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise Problem(413, f"The body is larger than {limit} bytes (server.max_body_bytes).")
        return bytes(body)


async def _pieces(answer: Any) -> AsyncGenerator[bytes, None]:
    try:
        async for piece in answer:
            yield piece
    finally:
        answer.cancel()  # a client that left; nothing happens where the answer is whole


def routing_text(body: bytes, key: str) -> str:
    """What the router compares: the beginning of a prompt or talk; empty where there is none.

    Requests of different keys share no cache, so their texts differ from the first character.
    """
    try:
        value: Any = json.loads(body)
        asked: Any = value.get("messages") or value.get("prompt")
    except (ValueError, AttributeError, RecursionError):
        return ""
    if not asked:
        return ""
    mark = hashlib.sha256(key.encode()).hexdigest()[:16] if key else ""
    text = asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False)
    return (mark + text)[:_ROUTED_CHARACTERS]


def _scope(call: Call) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": call.headers,
        "client": None,
        "server": None,
        "state": {},
    }


def build(arguments: dict[str, str]) -> Any:
    """The application for `serve run` or `serve deploy`.

    Args:
        arguments: `config`, a TOML file as of `atoma-jax serve` with a section `[ray]` as well.

    Raises:
        ConfigError: an argument or a setting is unknown or outside its limits.
    """
    if set(arguments) != {"config"}:
        raise ConfigError("arguments", sorted(arguments), "must be config=FILE alone")
    tables = read_toml(Path(arguments["config"]))
    ray = build_section("ray", RayConfig, tables.pop("ray", {}))
    settings = build_section("server", ServerConfig, tables.pop("server", {}))
    config = EngineConfig.from_sections(tables, {})
    if config.scheduler.max_num_queued_reqs is None:
        config = replace(config, scheduler=replace(config.scheduler, max_num_queued_reqs=DEFAULT_QUEUE))
    return application(config, settings, ray)


def application(config: EngineConfig, settings: ServerConfig, ray: RayConfig) -> Any:
    """The application out of checked settings. Host, port and keys of Ray's own are its proxy's."""
    router = {"request_router_class": _ROUTER, "request_router_kwargs": {"do_eviction": True}}
    replicas = serve.deployment(
        Replica,
        name="Replica",
        num_replicas=ray.num_replicas,
        max_ongoing_requests=ray.max_ongoing_requests,
        ray_actor_options={"num_cpus": ray.num_cpus, "num_gpus": ray.num_gpus},
        graceful_shutdown_timeout_s=settings.drain_timeout,
        request_router_config=router,
    )
    ingress = serve.deployment(Ingress, name="Ingress", max_ongoing_requests=1 << 16, ray_actor_options={"num_cpus": 0})
    return ingress.bind(replicas.bind(config, settings), settings)
