"""The program as operators meet it: killed, restarted, stormed by clients that leave, overloaded."""

import asyncio
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.server.conftest import Program, program

pytestmark = pytest.mark.slow

COMPLETIONS = "/v1/completions"
GREEDY: dict[str, Any] = {"prompt": [7, 8, 9], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
LONG: dict[str, Any] = {**GREEDY, "max_tokens": 55, "stream": True}


@pytest.fixture
def cache(request: pytest.FixtureRequest) -> Path:
    return request.config.cache.mkdir("xla")


def metric(client: httpx2.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


def until_idle(client: httpx2.Client) -> None:
    deadline = time.monotonic() + 30
    while client.get("/load").json()["server_load"] or metric(client, "vllm:num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def killed_by_the_first_token(running: Program) -> int:
    """Asks for eight long answers and kills the program as the first token comes; how many broke off."""

    async def ask(client: httpx2.AsyncClient) -> bool:
        try:
            async with client.stream("POST", COMPLETIONS, json=LONG) as stream:
                async for _ in stream.aiter_lines():
                    running.process.send_signal(signal.SIGKILL)
        except httpx2.HTTPError:
            return True
        return False

    async with httpx2.AsyncClient(base_url=running.address, timeout=30) as client:
        return sum(await asyncio.gather(*(ask(client) for _ in range(8))))


def test_killed_in_the_middle_of_answers_it_serves_again_after_a_restart(
    tiny_path: Path, tmp_path: Path, cache: Path
) -> None:
    """On the same port, from the same compile cache; and nothing of the first process is left."""
    with program(tiny_path, tmp_path, cache) as first:
        first.ready()
        port = first.address.rsplit(":", 1)[1]
        with httpx2.Client(base_url=first.address, timeout=30) as client:
            expected = client.post(COMPLETIONS, json=GREEDY).json()
        broken = asyncio.run(killed_by_the_first_token(first))
        assert broken >= 4  # of eight answers, four at a time
        assert first.process.wait(10) == -signal.SIGKILL
        with pytest.raises(ProcessLookupError):  # its group: no orphan
            os.killpg(first.process.pid, 0)
    with program(tiny_path, tmp_path, cache, "--port", port) as second:
        second.ready()
        with httpx2.Client(base_url=second.address, timeout=30) as client:
            again = client.post(COMPLETIONS, json=GREEDY).json()
            assert metric(client, "atoma:recompilations_total") == 0
        assert again["choices"] == expected["choices"]
        assert again["system_fingerprint"] == expected["system_fingerprint"]
        second.end()


class TestUnderLoad:
    @pytest.fixture
    def running(self, tiny_path: Path, tmp_path: Path, cache: Path) -> Any:
        with program(tiny_path, tmp_path, cache, "--max-num-queued-reqs", "8", "--disable-log-requests") as made:
            yield made.ready()
            made.end()

    def test_a_storm_of_clients_that_leave_leaves_nothing_behind(self, running: Program) -> None:
        async def leave(client: httpx2.AsyncClient, number: int) -> int:
            ask = {**LONG, "prompt": [7 + number % 90, 8], "stream": number % 2 == 0}
            try:
                async with asyncio.timeout(0.01 * (number % 7)):
                    return (await client.post(COMPLETIONS, json=ask)).status_code
            except TimeoutError:
                return 0

        async def storm() -> Counter[int]:
            limits = httpx2.Limits(max_connections=40)
            async with httpx2.AsyncClient(base_url=running.address, timeout=60, limits=limits) as client:
                return Counter(await asyncio.gather(*(leave(client, number) for number in range(300))))

        with httpx2.Client(base_url=running.address, timeout=30) as client:
            for _ in range(2):
                seen = asyncio.run(storm())
                assert set(seen) <= {0, 200, 429}
                assert seen[0] > 100
                until_idle(client)
                assert metric(client, "vllm:kv_cache_usage_perc") == 0
            assert client.post(COMPLETIONS, json=GREEDY).status_code == 200

    def test_ten_times_overload_refuses_and_loses_nothing(self, running: Program) -> None:
        """Four rows and a queue of eight, a hundred clients at once."""

        async def ask(client: httpx2.AsyncClient) -> httpx2.Response:
            return await client.post(COMPLETIONS, json={**GREEDY, "max_tokens": 40})

        async def flood() -> list[httpx2.Response]:
            limits = httpx2.Limits(max_connections=200)
            async with httpx2.AsyncClient(base_url=running.address, timeout=120, limits=limits) as client:
                return await asyncio.gather(*(ask(client) for _ in range(100)))

        answers = asyncio.run(flood())
        by_status = Counter(answer.status_code for answer in answers)
        assert set(by_status) == {200, 429}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)
        taken = [answer.json() for answer in answers if answer.status_code == 200]
        assert len(taken) >= 10
        assert all(answer["usage"]["completion_tokens"] == 40 for answer in taken)
        assert len({answer["choices"][0]["text"] for answer in taken}) == 1
        with httpx2.Client(base_url=running.address, timeout=30) as client:
            assert metric(client, "vllm:admission_rejections_total") == by_status[429]
            until_idle(client)

    def test_ten_thousand_requests_under_overload_are_all_answered_and_memory_stays_flat(
        self, running: Program
    ) -> None:
        """160 clients at once, each of which comes again when a refusal says. `-s` shows what it came to."""
        count, clients, points = 10_000, 160, 10
        left, statuses, texts, memory = count, Counter[int](), set[str](), list[int]()

        async def ask(client: httpx2.AsyncClient) -> None:
            nonlocal left
            while left > 0:
                left -= 1
                while (answer := await client.post(COMPLETIONS, json={**GREEDY, "max_tokens": 2})).status_code == 429:
                    statuses[429] += 1
                    await asyncio.sleep(int(answer.headers["retry-after"]))
                statuses[answer.status_code] += 1
                texts.add(answer.json()["choices"][0]["text"])
                if statuses[200] % (count // points) == 0:
                    memory.append(resident_mib(running))

        async def flood() -> None:
            limits = httpx2.Limits(max_connections=clients)
            async with httpx2.AsyncClient(base_url=running.address, timeout=120, limits=limits) as client:
                await asyncio.gather(*(ask(client) for _ in range(clients)))

        asyncio.run(flood())
        print(f"\nanswers {statuses}, resident MiB at every {count // points}: {memory}")  # to be quoted
        assert statuses[200] == count
        assert set(statuses) == {200, 429}
        assert len(texts) == 1
        assert max(memory[points // 2 :]) - max(memory[: points // 2]) < 16
        with httpx2.Client(base_url=running.address, timeout=30) as client:
            until_idle(client)
            assert metric(client, "vllm:admission_rejections_total") == statuses[429]


def resident_mib(running: Program) -> int:
    """Memory of the process that is resident now."""
    pages = int(Path(f"/proc/{running.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20
