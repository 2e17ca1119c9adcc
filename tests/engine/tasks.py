"""Requests of asyncio tasks to an `AsyncLLM`, and what is awaited of it."""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from random import Random

from atoma_jax import AsyncLLM, RequestOutput, SamplingParams
from tests.engine.inside import drained

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=80)

Serve = Callable[..., AsyncLLM]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return Random(seed).choices(range(3, 259), k=length)


async def finish(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    return [output async for output in outputs][-1]


async def idle(served: AsyncLLM) -> None:
    """Waits until the engine has nothing left, then asserts that it holds nothing."""
    while served._engine.has_work:
        await served.stats()
    drained(served._engine)
