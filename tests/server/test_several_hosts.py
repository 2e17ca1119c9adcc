"""`atoma-jax serve` as two processes of one engine: HTTP on the first one, and a clean end whoever goes first."""

import asyncio
import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from atoma_jax import LLM, SamplingParams
from tests.server.conftest import Program, program
from tests.server.test_program import metric, until_idle

pytestmark = pytest.mark.slow

PATIENCE = 20  # seconds in which everybody knows that a process is gone
COMPLETIONS = "/v1/completions"
LENGTH = 256
GREEDY: dict[str, Any] = {"prompt": [7, 8, 9], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
LONG: dict[str, Any] = {**GREEDY, "max_tokens": 240}
NUM_PAGES = 4 * 33 + 1  # of eight tokens: four of the longest sequences
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.fixture
def cache(request: pytest.FixtureRequest) -> Path:
    return request.config.cache.mkdir("xla")


@contextmanager
def processes(model: Path, folder: Path, cache: Path) -> Iterator[list[Program]]:
    """Both, ready."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    flags = ["--mesh", "fsdp=2", "--num-processes", "2", "--coordinator-address", f"127.0.0.1:{port}"]
    flags += ["--cpu-precision", "default", "--max-model-len", str(LENGTH), "--num-pages", str(NUM_PAGES)]
    with ExitStack() as stack:
        started: list[Program] = []
        for process in range(2):
            (own := folder / str(process)).mkdir()
            its = (*flags, "--process-id", str(process))
            started.append(stack.enter_context(program(model, own, cache, *its, num_devices=1)))
        started[0].ready()
        yield started


def test_all_kinds_of_requests_and_a_clean_end(tiny_path: Path, tmp_path: Path, cache: Path) -> None:
    llm = LLM(str(tiny_path), dtype="float32", kernels="xla", max_model_len=LENGTH, max_num_seqs=2, num_pages=32)
    params = SamplingParams(temperature=0, max_tokens=GREEDY["max_tokens"], ignore_eos=True)
    (output,) = llm.generate([GREEDY["prompt"]], params, use_tqdm=False)
    want = output.outputs[0].text
    llm.shutdown()
    with processes(tiny_path, tmp_path, cache) as (first, second):
        with httpx2.Client(base_url=first.address, timeout=60) as client:
            assert client.post(COMPLETIONS, json=GREEDY).json()["choices"][0]["text"] == want
            assert streamed(client, GREEDY) == want
            body = {
                "messages": [{"role": "user", "content": "a number"}],
                "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
                "temperature": 0,
                "max_tokens": 40,
                "logit_bias": {"64": 5},  # '}' at some time
            }
            answered = client.post("/v1/chat/completions", json=body).json()["choices"][0]
            if answered["finish_reason"] == "stop":
                assert isinstance(json.loads(answered["message"]["content"])["n"], int)
            assert answered["message"]["content"].startswith("{")
            with client.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as stream:
                next(stream.iter_lines())
            until_idle(client)  # who leaves takes the request along
            assert client.post(COMPLETIONS, json=GREEDY).json()["choices"][0]["text"] == want
            assert metric(client, "atoma:recompilations_total") == 0
        for running in (second, first):  # as whoever runs both would
            running.process.send_signal(signal.SIGTERM)
        for running in (first, second):
            assert running.process.wait(PATIENCE) == 0, running.log.read_text()


def streamed(client: httpx2.Client, body: dict[str, Any]) -> str:
    with client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as stream:
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: {")]
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


def test_requests_in_flight_fail_cleanly_when_a_process_is_lost(tiny_path: Path, tmp_path: Path, cache: Path) -> None:
    with processes(tiny_path, tmp_path, cache) as (first, second):
        failed = asyncio.run(lost_in_the_middle(first, second))
        assert failed == ["answer", "answer", "stream", "stream"]
        begin = time.monotonic()
        assert first.process.wait(PATIENCE) == 1
        assert time.monotonic() - begin < PATIENCE
        assert any("process 1 is lost" in json.dumps(line) for line in first.lines)


async def lost_in_the_middle(first: Program, second: Program) -> list[str]:
    """Two answers and two streams in flight as process 1 is killed; those that were told so, by kind."""

    async def ask(client: httpx2.AsyncClient) -> str:
        while True:  # one that was done before asks again
            response = await client.post(COMPLETIONS, json=LONG)
            if response.status_code != 200:
                assert response.status_code >= 500
                assert "lost" in response.json()["error"]["message"]
                return "answer"

    async def read(client: httpx2.AsyncClient) -> str:
        while True:
            async with client.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as stream:
                async for line in stream.aiter_lines():
                    if second.process.poll() is None:
                        second.process.kill()
                    if '"error"' in line:
                        assert "lost" in line
                        return "stream"

    async with httpx2.AsyncClient(base_url=first.address, timeout=PATIENCE) as client:
        kinds = await asyncio.gather(ask(client), ask(client), read(client), read(client))
    return sorted(kinds)
