"""Server-sent events: how they are written, and a response that gives up on a client that does not read."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from atoma_jax.server.errors import ClientGone, problem_of

DONE = b"data: [DONE]\n\n"

_log = logging.getLogger(__name__)

Events = AsyncGenerator[bytes, None]

encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once, not for every token


def event_of(text: str) -> bytes:
    """One event. JSON's own line ends are escaped, so that it is one line whatever it holds."""
    return f"data: {text}\n\n".encode()


class EventStream(Response):
    """A stream of events, each of which holds an object, closed by `[DONE]`.

    An error before the first event is raised by `open`, so that it has a status of its own; a later one is an object
    with the key `error`.
    """

    media_type = "text/event-stream; charset=utf-8"

    def __init__(self, first: bytes, rest: Events, *, send_timeout: float, headers: Mapping[str, str]):
        """Use `open`."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]  # Response has put in that of an empty body
        self._first, self._rest, self._send_timeout = first, rest, send_timeout

    @classmethod
    async def open(cls, events: Events, *, send_timeout: float, headers: Mapping[str, str]) -> "EventStream":
        """Waits for the first event.

        Args:
            events: as bytes; closed in the end, whatever happens.
            send_timeout: seconds that a client may leave what was sent unread.
            headers: further ones.
        """
        try:
            first = await anext(events)
        except BaseException:
            await events.aclose()
            raise
        return cls(first, events, send_timeout=send_timeout, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends everything."""
        del scope, receive  # whoever makes the events listens for the client's leaving
        try:
            async with asyncio.timeout(None) as limit:
                with _Patience(send, limit, self._send_timeout) as patient:
                    await self._send_all(patient)
        except TimeoutError:
            _log.warning("a client left its stream unread for %g s: given up", self._send_timeout)
            raise ClientGone("The client does not read.") from None
        finally:
            await self._rest.aclose()

    async def _send_all(self, patient: "_Patience") -> None:
        await patient.send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await patient.send_body(self._first)
        try:
            async for event in self._rest:
                await patient.send_body(event)
        except ClientGone:
            raise
        except Exception as error:
            problem = problem_of(error)
            if problem is not error:
                _log.error("a stream failed", exc_info=error)
            await patient.send_body(event_of(encode(problem.body())))
        await patient.send_body(DONE)
        await patient.send({"type": "http.response.body", "body": b"", "more_body": False})


class _Patience:
    """Sends, and ends a time limit once one message has waited too long. A single timer looks at all messages: one for
    each would cost more than the message."""

    def __init__(self, send: Send, limit: asyncio.Timeout, seconds: float):
        """`limit` is around all that is sent."""
        self._send, self._limit, self._seconds = send, limit, seconds
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None  # when the message that waits was handed over

    def __enter__(self) -> "_Patience":
        self._timer = self._loop.call_later(self._seconds, self._look)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    async def send(self, message: dict[str, Any]) -> None:
        """Waits until the connection takes a message."""
        self._since = self._loop.time()
        await self._send(message)
        self._since = None

    async def send_body(self, data: bytes) -> None:
        """A piece of the body, after which another one comes."""
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    def _look(self) -> None:
        now = self._loop.time()
        since = now if self._since is None else self._since
        if now - since >= self._seconds:
            self._limit.reschedule(now)
        else:
            self._timer = self._loop.call_at(since + self._seconds, self._look)
