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

Events = AsyncGenerator[dict[str, Any], None]


def event(value: Mapping[str, Any]) -> bytes:
    """One event. JSON's own line ends are escaped, so that it is one line whatever it holds."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A stream of objects, closed by `[DONE]`.

    An error before the first object is raised by `open`, so that it has a status of its own; a later one is an object
    with the key `error`.
    """

    media_type = "text/event-stream; charset=utf-8"

    def __init__(self, first: dict[str, Any], rest: Events, *, send_timeout: float, headers: Mapping[str, str]):
        """Use `open`."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]  # Response has put in that of an empty body
        self._first, self._rest, self._send_timeout = first, rest, send_timeout

    @classmethod
    async def open(cls, events: Events, *, send_timeout: float, headers: Mapping[str, str]) -> "EventStream":
        """Waits for the first object.

        Args:
            events: the objects; closed in the end, whatever happens.
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
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._body(send, event(self._first))
            try:
                async for value in self._rest:
                    await self._body(send, event(value))
            except (ClientGone, TimeoutError):
                raise
            except Exception as error:
                problem = problem_of(error)
                if problem is not error:
                    _log.error("a stream failed", exc_info=error)
                await self._body(send, event(problem.body()))
            await self._body(send, DONE)
            await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            _log.warning("a client left its stream unread for %g s: given up", self._send_timeout)
            raise ClientGone("The client does not read.") from None
        finally:
            await self._rest.aclose()

    async def _body(self, send: Send, data: bytes) -> None:
        await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        async with asyncio.timeout(self._send_timeout):
            await send(message)
