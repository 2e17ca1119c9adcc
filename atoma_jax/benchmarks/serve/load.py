"""Sends a workload at its pace; what comes back is in its order."""

import asyncio
import time
from collections.abc import Callable, Sequence

import httpx

from atoma_jax.benchmarks.serve.client import Ask, Outcome, Target, send
from atoma_jax.benchmarks.serve.workload import Pace


async def run_load(
    client: httpx.AsyncClient, target: Target, asks: Sequence[Ask], pace: Pace, on_done: Callable[[Outcome], None]
) -> tuple[list[Outcome], float]:
    """Sends a workload.

    Args:
        client: with as many connections as `pace` allows at once.
        target: where requests go.
        asks: the requests.
        pace: when they go.
        on_done: told of each as it ends.

    Returns:
        One outcome for each request, in their order, and when the last one ended, on their clock.
    """
    room = asyncio.Semaphore(pace.max_concurrency or len(asks) or 1)
    loop = asyncio.get_running_loop()
    begin = loop.time()

    async def one(ask: Ask, moment: float) -> Outcome:
        await asyncio.sleep(begin + moment - loop.time())
        async with room:
            outcome = await send(client, target, ask)
        on_done(outcome)
        return outcome

    calls = [one(ask, moment) for ask, moment in zip(asks, pace.moments(len(asks)), strict=True)]
    outcomes = await asyncio.gather(*calls)
    return outcomes, time.perf_counter()
