"""What stands before every route: request ids, keys, and limits on what is read from a client. Plain ASGI.

From the outside in: `Records` (an id and a log line for each request, an answer for every exception), `Keys`, `Bodies`.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atoma_jax import EngineDeadError, Overloaded, UserError
from atoma_jax.server.answers import Usage
from atoma_jax.server.errors import ClientGone, Problem, problem_of
from atoma_jax.server.service import Service

QUIET_PATHS = frozenset({"/health", "/ping", "/ready", "/metrics"})  # asked for all the time: no line in the log
# What only a key opens, where there are any: the API, and what changes the server; or all but the probes. Why it is a
# setting: docs/server.md.
_PROBES = frozenset({"/health", "/ping", "/ready"})
_KEPT_PATHS = frozenset({"/start_profile", "/stop_profile", "/reset_prefix_cache"})
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_CLIENT_CLOSED = 499  # nginx's word for it, in logs alone

_log = logging.getLogger(__name__)


class Records:
    """Gives each request an id, a log line, and an answer whatever goes wrong."""

    def __init__(self, app: ASGIApp, service: Service):
        """`service` counts what is being answered."""
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        fields: dict[str, Any] = {"method": scope["method"], "path": scope["path"][:200]}
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = fields["request_id"]
            await send(message)

        self._service.responses += 1
        try:
            fields["request_id"] = secrets.token_hex(8)
            asked = Headers(scope=scope).get("x-request-id")
            _check_size(scope, self._service.settings.max_header_bytes)
            scope["state"] = {**scope.get("state", {}), "log": fields, "request_id": fields["request_id"], "key": None}
            if asked is not None:
                if not _REQUEST_ID.fullmatch(asked):
                    problem = "X-Request-Id: must have 1 to 128 visible ASCII characters."
                    raise Problem(400, problem, param="X-Request-Id")
                fields["request_id"] = scope["state"]["request_id"] = asked
            await self._app(scope, receive, noted)
        except ClientGone:
            status = _CLIENT_CLOSED
        except Exception as error:
            if not isinstance(error, (Problem, UserError, Overloaded, EngineDeadError)):
                _log.exception("a request failed", extra={"fields": {"request_id": fields["request_id"]}})
            if isinstance(error, Overloaded):
                self._service.metrics.count_rejection("queue_full")
            problem = problem_of(error)
            if problem.status == 503 and self._service.health in ("loading", "draining", "dead"):
                self._service.metrics.count_rejection("unavailable")
            if status == 0:
                await problem.response()(scope, receive, noted)
            fields["error"] = problem.status
        finally:
            self._service.responses -= 1
            if self._service.settings.log_requests and scope["path"] not in QUIET_PATHS:
                usage = fields.pop("usage", None)
                fields |= {"status": status, "seconds": round(time.perf_counter() - begin, 6)}
                if isinstance(usage, Usage):
                    fields |= {"prompt_tokens": sum(usage.prompts.values()), "completion_tokens": usage.completion}
                _log.info("request", extra={"fields": fields})


def _check_size(scope: Scope, limit: int) -> None:
    """Refuses headers that came at once and so were whole before the connection's own limit saw them.

    Raises:
        Problem: 431.
    """
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    for name, value in scope["headers"]:
        size += len(name) + len(value) + 4  # a colon, a space and the line's end
    if size > limit:
        raise Problem(431, f"The headers are larger than {limit} bytes (--max-header-bytes).")


class Keys:
    """Opens what is kept to who brings one of the keys, where there are any."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], scope: Literal["api", "all"]):
        """No keys: everybody is let in. `scope` says what they open: the API, or all but the probes."""
        self._app, self._guards_all = app, scope == "all"
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or answers 401."""
        if scope["type"] == "http" and self._digests and self._is_kept(scope["path"]):
            kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not self._known(key.strip()):
                raise Problem(401, "Authorization: must be Bearer and a valid API key.", param="Authorization")
            scope["state"]["key"] = key.strip()
        await self._app(scope, receive, send)

    def _is_kept(self, path: str) -> bool:
        if self._guards_all:
            return path not in _PROBES
        return path == "/v1" or path.startswith("/v1/") or path in _KEPT_PATHS

    def _known(self, key: str) -> bool:
        """Takes the same time whichever key it is or nearly is: digests are compared, with every key."""
        digest = hashlib.sha256(key.encode("latin-1", "replace")).digest()
        return any([hmac.compare_digest(digest, known) for known in self._digests])  # noqa: C419  all of them


class Bodies:
    """Reads a request's body whole, within limits of size and time, before anything parses it."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout: float):
        """Args: the application; bytes of a body; seconds until all of it must have come."""
        self._app, self._max_bytes, self._timeout = app, max_bytes, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or answers 400, 408, 413 or 415."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Problem(415, "Content-Encoding: compressed bodies are not read.", param="Content-Encoding")
        declared = headers.get("content-length", "0")
        if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > self._max_bytes):
            raise self._too_large()
        try:
            async with asyncio.timeout(self._timeout):
                body = await self._read(receive)
        except TimeoutError:
            problem = f"The body took longer than {self._timeout:g} s (--body-timeout)."
            raise Problem(408, problem) from None
        _check_text(body)
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone("The client left before its request was whole.")
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> Problem:
        return Problem(413, f"The body is larger than {self._max_bytes} bytes (--max-body-bytes).")


def _check_text(body: bytes) -> None:
    """Refuses text that has no UTF-8 form: Python's JSON reads it, and nothing can write it again.

    Raises:
        Problem: 400.
    """
    try:
        body.decode()
    except UnicodeDecodeError:
        raise Problem(400, "The body must be UTF-8.") from None
    if rb"\ud" in body or rb"\uD" in body:  # escapes of surrogates; few bodies have any, so they may be parsed twice
        try:
            json.dumps(json.loads(body), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Problem(400, "The body holds a lone surrogate (\\ud800 to \\udfff): send valid Unicode.") from None
        except (ValueError, RecursionError):
            return  # no JSON: said by who parses it for good
