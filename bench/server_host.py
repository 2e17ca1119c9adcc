"""The server's own time for a streamed token: of the event loop's thread, with a device that is replaced by a stub.

`python -m bench.server_host --model smollm2-135m-instruct --clients 64` runs `atoma-jax serve`'s own process over a
real socket; the clients are another process. Times are the threads' CPU time, which other processes on the machine do
not change much. A step takes `step_ms` without work, so that outputs come as from a device: together.
"""

import asyncio
import json
import os
import signal
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import typer

from atoma_jax import AsyncLLM, EngineConfig
from atoma_jax.engine.plan import StepPlan
from atoma_jax.engine.runner import HostOutput
from atoma_jax.engine.startup import StartupReport
from atoma_jax.server.run import Process, listen
from atoma_jax.server.service import Service
from atoma_jax.server.settings import ServerConfig
from bench.host_step import PROMPT_TOKENS, StubOutput, StubRunner, stub_engine

MAX_MODEL_LEN = 8192


class SlowOutput(StubOutput):
    """Results that come after a while, in which the thread sleeps."""

    def __init__(self, tokens: np.ndarray, seconds: float):
        """`seconds` until they are there."""
        super().__init__(tokens)
        self._seconds = seconds

    def read(self) -> HostOutput:
        """Waits."""
        time.sleep(self._seconds)
        return super().read()


class SlowRunner(StubRunner):
    """Steps of a fixed time."""

    def __init__(self, *sizes: Any, seconds: float):
        """`sizes` as of the base; `seconds` of a step."""
        super().__init__(*sizes)
        self._seconds = seconds

    def launch(self, plan: StepPlan) -> StubOutput:
        """Packs the plan; the device sleeps."""
        return SlowOutput(super().launch(plan).read().tokens, self._seconds)

    def check(self) -> None:
        """One process alone cannot lose another."""

    def when_lost(self, call: object) -> None:
        """As above."""

    def close(self) -> None:
        """Nothing to give back."""


async def client(address: tuple[str, int], chat: bool, tokens: int) -> int:
    """One conversation over a socket of its own; returns the bytes of its stream."""
    ask: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    ask |= {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": [1000] * PROMPT_TOKENS}
    body = json.dumps({**ask, "stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection(*address)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    received = await reader.read(-1)
    writer.close()
    if b"data: [DONE]" not in received or received.count(b"data: {") < tokens:
        raise SystemExit(received[-2000:].decode(errors="replace"))
    return len(received)


async def ask_all(port: int, clients: int, chat: bool, tokens: int) -> None:
    """What the clients' process does."""
    await asyncio.gather(*(client(("127.0.0.1", port), chat, tokens) for _ in range(clients)))


def main(
    model: str = "smollm2-135m-instruct",
    clients: int = 64,
    tokens: int = 128,
    rounds: int = 3,
    step_ms: float = 30.0,
    chat: bool = False,
    profile: str | None = None,
    port: int | None = None,
) -> None:
    """Prints microseconds of a token, the least of all rounds, as one JSON object. `port`: be the clients."""
    if port is not None:
        asyncio.run(ask_all(port, clients, chat, tokens))
        return
    engine = stub_engine(model, clients, tokens, MAX_MODEL_LEN, partial(SlowRunner, seconds=step_ms / 1e3))
    llm = AsyncLLM(engine, StartupReport())
    settings = ServerConfig(port=0, log_requests=False, log_stats=False)
    listener = listen(settings)
    service = Service(EngineConfig.from_options({"model": model}), settings)
    process = Process(service, listener, lambda: llm)
    flags = ["--port", str(listener.getsockname()[1]), "--clients", str(clients), "--tokens", str(tokens)]
    command = [sys.executable, "-m", "bench.server_host", *flags, "--chat" if chat else "--no-chat"]

    async def serve() -> list[tuple[float, float]]:
        running = asyncio.create_task(process.run())
        while service.health != "ready":
            await asyncio.sleep(0.01)
        seconds: list[tuple[float, float]] = []
        for _ in range(rounds):
            before = time.thread_time(), time.perf_counter()
            child = await asyncio.create_subprocess_exec(*command)
            if await child.wait():
                raise SystemExit("the clients failed")
            seconds.append((time.thread_time() - before[0], time.perf_counter() - before[1]))
        os.kill(os.getpid(), signal.SIGTERM)
        await running
        return seconds

    if profile is not None:
        import cProfile

        recorder = cProfile.Profile(time.thread_time)
        seconds = recorder.runcall(asyncio.run, serve())
        recorder.dump_stats(profile)
    else:
        seconds = asyncio.run(serve())
    count = clients * tokens
    result = {
        "clients": clients,
        "tokens": count,
        "loop_us_per_token": [round(1e6 * loop / count, 1) for loop, _ in seconds],
        "wall_s": [round(wall, 2) for _, wall in seconds],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
