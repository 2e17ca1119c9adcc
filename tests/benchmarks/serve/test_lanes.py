"""Connections of the load: as many as requests under way, and used again."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest

from atoma_jax.benchmarks.serve.lanes import Lanes

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Ask = Callable[[], Awaitable[httpx.Response]]


def connections_of(work: Callable[[Ask], Awaitable[None]], answer: bytes = ANSWER) -> tuple[int, int]:
    """How many connections a server sees, and how many are open in the end; it answers each request after a moment."""
    opened, closed = 0, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened, closed
        opened += 1
        while await reader.readline():
            while (await reader.readline()).strip():
                pass
            await asyncio.sleep(0.01)
            writer.write(answer)
            if not answer:
                break
        closed += 1
        writer.close()

    async def main() -> int:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with httpx.AsyncClient(transport=Lanes()) as client:
            await work(lambda: client.get(url))
        while closed < opened:
            await asyncio.sleep(0.001)
        server.close()
        return opened

    return asyncio.run(asyncio.wait_for(main(), 20)), opened - closed


def test_one_for_each_request_under_way_used_again_by_later_ones() -> None:
    async def work(ask: Ask) -> None:
        for _ in range(3):
            assert {(await answer).text for answer in asyncio.as_completed([ask() for _ in range(5)])} == {"ok"}

    assert connections_of(work) == (5, 0)


def test_one_that_fails_is_closed_and_the_next_request_has_a_new_one() -> None:
    async def work(ask: Ask) -> None:
        for _ in range(2):
            with pytest.raises(httpx.RemoteProtocolError):
                await ask()

    assert connections_of(work, b"") == (2, 0)
