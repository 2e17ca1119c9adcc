"""Much traffic, much of it cut off: nothing is left behind, and memory does not grow."""

import asyncio
import gc
import random
import resource
from collections import Counter
from typing import Any

import pytest

from atoma_jax.engine.request import Request
from atoma_jax.server.generation import Generation
from tests.server.conftest import Serve, Served, connected
from tests.server.test_leaving import body_of

COMPLETIONS = "/v1/completions"


async def traffic(server: Served, rng: random.Random, count: int) -> Counter[int | None]:
    """Requests from sixteen clients at once; a quarter leaves at some moment."""
    statuses: Counter[int | None] = Counter()

    async def client(share: int) -> None:
        for _ in range(share):
            prompt = [rng.randrange(3, 259) for _ in range(rng.randint(1, 40))]
            ask: dict[str, Any] = {"prompt": prompt, "max_tokens": rng.randint(1, 12), "stream": rng.random() < 0.5}
            async with connected(server.app, COMPLETIONS, body_of(**ask)) as wire:
                if rng.random() < 0.25:
                    await asyncio.sleep(rng.random() * 0.02)
                    wire.gone.set()
                await wire.finish()
            statuses[wire.status] += 1

    await asyncio.gather(*(client(count // 16) for _ in range(16)))
    await server.idle()
    return statuses


@pytest.mark.slow
def test_ten_times_overload_for_long_leaves_nothing_behind(serve: Serve) -> None:
    server = serve(limits={"max_waiting": 6})
    rng = random.Random(0)

    async def main() -> tuple[Counter[int | None], list[int]]:
        seen: Counter[int | None] = Counter()
        peaks: list[int] = []
        for _ in range(4):
            seen += await traffic(server, rng, 1600)
            gc.collect()
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)  # MiB
        return seen, peaks

    seen, peaks = asyncio.run(main())
    assert set(seen) <= {200, 429, None}  # None: left before there was an answer
    assert seen[200] > 500
    assert seen[429] > 500
    assert peaks[-1] - peaks[1] < 16, peaks
    assert not [item for item in gc.get_objects() if isinstance(item, (Generation, Request))]
