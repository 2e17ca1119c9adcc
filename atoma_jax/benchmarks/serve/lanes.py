"""Connections of the load: one for each request under way, used again by later ones.

httpx's pool looks at every connection for each connection at each request; from some dozens on, a load generator that
shares the machine would spend more on that than on its requests, and the first ones would leave late.
"""

from collections.abc import AsyncIterator

import httpx


class Lanes(httpx.AsyncBaseTransport):
    """A transport that gives each request a pool of one connection to itself, until its answer is closed."""

    def __init__(self) -> None:
        """No connection yet. Nothing of the environment counts: neither proxies nor certificates."""
        self._context = httpx.create_ssl_context(trust_env=False)  # made once, as it takes longer than a request
        self._idle: list[httpx.AsyncHTTPTransport] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request over a connection that is idle, or a new one."""
        lane = self._idle.pop() if self._idle else self._new()
        try:
            response = await lane.handle_async_request(request)
        except BaseException:
            await lane.aclose()
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Answer(response.stream, lane, self._idle)
        return response

    async def aclose(self) -> None:
        """Closes what is idle; answers must be closed by then."""
        while self._idle:
            await self._idle.pop().aclose()

    def _new(self) -> httpx.AsyncHTTPTransport:
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
        return httpx.AsyncHTTPTransport(verify=self._context, limits=limits, trust_env=False)


class _Answer(httpx.AsyncByteStream):
    """The body of an answer, which gives its lane back."""

    def __init__(
        self, stream: httpx.AsyncByteStream, lane: httpx.AsyncHTTPTransport, idle: list[httpx.AsyncHTTPTransport]
    ):
        self._stream, self._lane, self._idle = stream, lane, idle

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._stream.__aiter__()

    async def aclose(self) -> None:
        await self._stream.aclose()
        self._idle.append(self._lane)
