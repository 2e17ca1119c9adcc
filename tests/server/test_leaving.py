"""Requests that end early: clients that leave or do not read, deadlines, a full queue, a lost engine, a shutdown."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from atoma_jax import LLM, SamplingParams
from tests.engine.inside import poison
from tests.server.conftest import Serve, Served, Wire, connected

COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {"max_tokens": 80, "temperature": 0, "ignore_eos": True}


def body_of(**body: Any) -> list[bytes]:
    return [json.dumps({"prompt": [7, 8, 9], **LONG, **body}).encode()]


def held(server: Served) -> Callable[[], None]:
    """Holds the engine's thread until what is returned is called: requests then wait, whatever there is room for."""
    gate = threading.Event()

    def hold() -> None:
        gate.wait(20)

    server.llm._call(hold)
    return gate.set


def tokens_of(server: Served) -> int:
    return server.engine._recorder.generation_tokens


async def left(server: Served, wire: Wire) -> None:
    """The client goes; asserts that the pages come back within two steps."""
    steps = server.engine._recorder._steps
    wire.gone.set()
    await wire.finish()
    await server.llm.stats()
    assert server.engine.scheduler_stats().pages_owned == 0
    assert server.engine._recorder._steps <= steps + 3  # the one under way, and two
    await server.idle()


@pytest.mark.parametrize("stream", [False, True])
class TestAClientThatLeaves:
    def test_while_it_decodes(self, server: Served, stream: bool) -> None:
        async def main() -> None:
            async with connected(server.app, COMPLETIONS, body_of(stream=stream)) as wire:
                await wire.until(lambda: tokens_of(server) > 5)
                await left(server, wire)
            assert tokens_of(server) < 70

        asyncio.run(main())

    def test_while_it_is_queued(self, serve: Serve, stream: bool) -> None:
        server = serve(limits={"max_num_seqs": 1})

        async def main() -> None:
            first = connected(server.app, COMPLETIONS, body_of())
            second = connected(server.app, COMPLETIONS, body_of(stream=stream, prompt=[5] * 40, n=2))
            async with first as one, second as two:
                await one.until(lambda: server.engine.scheduler_stats().num_waiting == 2)
                two.gone.set()
                await two.finish()
                await server.llm.stats()
                assert server.engine.scheduler_stats().num_waiting == 0
                assert server.engine.scheduler_stats().num_running == 1
                await one.finish()
            assert one.status == 200
            await server.idle()

        asyncio.run(main())

    def test_in_prefill(self, server: Served, stream: bool) -> None:
        """Three steps long; the client leaves as soon as the first is dispatched."""

        async def main() -> None:
            async with connected(server.app, COMPLETIONS, body_of(prompt=[5] * 90, stream=stream)) as wire:
                await wire.until(lambda: server.engine.scheduler_stats().num_running == 1)
                await left(server, wire)
            assert tokens_of(server) <= 1

        asyncio.run(main())

    def test_while_it_is_preempted(self, serve: Serve, stream: bool) -> None:
        """Pages for little more than one of two: the later one gives its own back, and waits to be computed anew."""
        server = serve(limits={"num_pages": 14})
        step = server.engine.step

        def preempted() -> bool:
            stats = server.engine.scheduler_stats()
            return (stats.num_running, stats.num_waiting) == (1, 1) and tokens_of(server) > 40

        def slowly() -> Any:
            if preempted():
                time.sleep(0.05)  # time for the client to leave before there is room again
            return step()

        server.engine.step = slowly

        async def main() -> None:
            first = connected(server.app, COMPLETIONS, body_of())
            second = connected(server.app, COMPLETIONS, body_of(prompt=[5, 6], stream=stream))
            async with first as one, second as two:
                await two.until(preempted)
                two.gone.set()
                await two.finish()
                await server.llm.stats()
                assert server.engine.scheduler_stats().num_waiting == 0
                await one.finish()
            assert one.status == 200
            await server.idle()

        asyncio.run(main())

    def test_before_the_engine_knows_of_it(self, server: Served, stream: bool) -> None:
        async def main() -> None:
            release = held(server)
            async with connected(server.app, COMPLETIONS, body_of(stream=stream)) as wire:
                await wire.until(lambda: len(server.service.in_flight) == 1)
                wire.gone.set()
                await asyncio.sleep(0.01)
                release()
                await wire.finish()
            await server.idle()

        asyncio.run(main())

    def test_with_several_prompts(self, server: Served, stream: bool) -> None:
        async def main() -> None:
            prompts = [[5, 6], [7, 8], [9]]
            async with connected(server.app, COMPLETIONS, body_of(prompt=prompts, n=2, stream=stream)) as wire:
                await wire.until(lambda: tokens_of(server) > 5)
                await left(server, wire)

        asyncio.run(main())


def test_a_client_that_stops_to_read_is_given_up(serve: Serve) -> None:
    server = serve(send_timeout=0.2)

    async def main() -> None:
        async with connected(server.app, COMPLETIONS, body_of(stream=True)) as wire:
            await wire.until(lambda: len(wire.sent) > 3)
            wire.reads.clear()
            await wire.finish()
            assert not wire.sent[-1]["body"].endswith(b"[DONE]\n\n")
        await server.idle()

    asyncio.run(main())


class TestDeadlines:
    @pytest.mark.parametrize("stream", [False, True])
    def test_of_the_queue(self, serve: Serve, stream: bool) -> None:
        server = serve(queue_timeout=0.05)

        async def main() -> None:
            release = held(server)
            async with connected(server.app, COMPLETIONS, body_of(stream=stream)) as wire:
                await asyncio.sleep(0.1)
                server.engine._scheduler._admit = lambda *_: None  # no step has room
                release()
                await wire.finish()
                del server.engine._scheduler._admit
            assert wire.status == 503
            assert b"--queue-timeout" in wire.body
            assert dict(wire.sent[0]["headers"])[b"retry-after"]
            await server.idle()

        asyncio.run(main())

    def test_of_the_whole_request(self, serve: Serve) -> None:
        server = serve(request_timeout=0.1)
        step = server.engine.step

        def slow() -> Any:
            time.sleep(0.01)
            return step()

        server.engine.step = slow
        error = server.refused(COMPLETIONS, {"prompt": "a", **LONG}, 504)
        assert "--request-timeout" in error["message"]
        text = server.post(COMPLETIONS, {"prompt": "a", "stream": True, **LONG}).text
        events = text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == 504


def test_overload_is_refused_and_what_was_taken_finishes(serve: Serve) -> None:
    server = serve(limits={"max_num_seqs": 2, "max_waiting": 3})

    async def main() -> list[Any]:
        async with server.client() as client:
            body = {"prompt": [7, 8, 9], **LONG}
            return await asyncio.gather(*(client.post(COMPLETIONS, json=body) for _ in range(30)))

    responses = asyncio.run(main())
    statuses = [response.status_code for response in responses]
    assert set(statuses) == {200, 429}
    texts = {response.json()["choices"][0]["text"] for response in responses if response.status_code == 200}
    assert len(texts) == 1
    refused = next(response for response in responses if response.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "RateLimitError"
    asyncio.run(server.idle())
    page = server.get("/metrics").text
    assert f'reason="queue_full"}} {statuses.count(429)}.0' in page


def test_a_request_of_several_prompts_is_taken_whole_or_not_at_all(serve: Serve) -> None:
    server = serve(limits={"max_num_seqs": 1, "max_waiting": 2})

    async def main() -> None:
        release = held(server)
        async with connected(server.app, COMPLETIONS, body_of(prompt=[[5], [6], [7], [8]])) as wire:
            await asyncio.sleep(0.01)
            release()
            await wire.finish()
        assert wire.status == 429
        await server.idle()

    asyncio.run(main())


class TestFaults:
    @pytest.mark.parametrize("stream", [False, True])
    def test_numbers_that_are_not_finite_concern_one_request(self, server: Served, llm: LLM, stream: bool) -> None:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        alone = llm.generate([[7, 8]], params, use_tqdm=False)[0].outputs[0].text

        async def main() -> None:
            async with connected(server.app, COMPLETIONS, body_of(stream=stream, prompt=[5] * 20)) as wire:
                await wire.until(lambda: tokens_of(server) > 2)
                release = held(server)
                await asyncio.sleep(0.05)
                (seq,) = server.engine._scheduler._running
                poison(llm.llm_engine._runner, seq.pages[0])
                release()
                async with server.client() as client:
                    ask = {"prompt": [7, 8], "temperature": 0, "max_tokens": 8, "ignore_eos": True}
                    other = await client.post(COMPLETIONS, json=ask)
                await wire.finish()
            assert other.json()["choices"][0]["text"] == alone
            assert b"not finite" in wire.body
            assert wire.status == (200 if stream else 500)
            assert wire.body.endswith(b"data: [DONE]\n\n") == stream
            await server.idle()

        asyncio.run(main())

    def test_a_lost_engine_is_heard_of_by_everyone(self, serve: Serve) -> None:
        server = serve(fails_at=6)

        async def main() -> None:
            streamed = connected(server.app, COMPLETIONS, body_of(stream=True))
            whole = connected(server.app, COMPLETIONS, body_of())
            async with streamed as one, whole as two, server.client() as client:
                await one.finish()
                await two.finish()
                assert (one.status, two.status) == (200, 500)
                assert b'"error"' in one.body
                assert one.body.endswith(b"data: [DONE]\n\n")
                assert b"the device" not in one.body + two.body
                assert (await client.get("/health")).status_code == 503
                assert (await client.get("/ready")).status_code == 503
                later = await client.post(COMPLETIONS, json={"prompt": "a"})
                assert later.status_code == 503
                assert (await client.get("/metrics")).status_code == 200
            assert not server.service.in_flight

        asyncio.run(main())

    def test_a_device_that_hangs_is_noticed(self, serve: Serve) -> None:
        server = serve(stall_timeout=0.05)

        async def main() -> None:
            release = held(server)
            async with server.client() as client:
                assert (await client.get("/health")).status_code == 200
                await asyncio.sleep(0.1)
                response = await client.get("/health")
                assert (response.status_code, response.headers["x-state"]) == (503, "stalled")
                release()
                await server.llm.stats()
                await asyncio.sleep(0.01)
                assert (await client.get("/health")).status_code == 200

        asyncio.run(main())


class TestShutdown:
    def test_a_drain_lets_run_what_runs(self, server: Served) -> None:
        async def main() -> None:
            async with connected(server.app, COMPLETIONS, body_of()) as wire, server.client() as client:
                await wire.until(lambda: tokens_of(server) > 1)
                server.service.drain()
                assert (await client.get("/health")).status_code == 200
                assert (await client.get("/ready")).status_code == 503
                refused = await client.post(COMPLETIONS, json={"prompt": "a"})
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, 503)
                assert "retry-after" in refused.headers
                await wire.finish()
            assert wire.status == 200
            assert json.loads(wire.body)["usage"]["completion_tokens"] == 80

        asyncio.run(main())

    @pytest.mark.parametrize("stream", [False, True])
    def test_what_is_stopped_hears_of_it(self, server: Served, stream: bool) -> None:
        async def main() -> None:
            async with connected(server.app, COMPLETIONS, body_of(stream=stream)) as wire:
                await wire.until(lambda: tokens_of(server) > 3)
                server.service.stop_all()
                await wire.finish()
            assert b"shutting down" in wire.body
            assert wire.status == (200 if stream else 503)
            await server.idle()

        asyncio.run(main())


def test_before_the_engine_is_there(server: Served) -> None:
    llm, server.service._llm = server.service._llm, None
    server.service._phase = "loading"
    try:
        assert server.get("/health").headers["x-state"] == "loading"
        assert server.get("/ready").status_code == 503
        for path, body in ((COMPLETIONS, {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
            assert "being loaded" in server.refused(path, body, 503)["message"]
        assert server.get("/v1/models").status_code == 503
        assert server.get("/metrics").status_code == 200
    finally:
        server.service._llm, server.service._phase = llm, "ready"


def test_a_client_cannot_name_anothers_request(server: Served) -> None:
    """Two requests of one id run beside each other, and each gets its own."""

    async def main() -> None:
        async with server.client() as client:
            asks = [{"prompt": [7, 8], "request_id": "same", "seed": s, **LONG, "temperature": 1} for s in (1, 2)]
            one, two = await asyncio.gather(*(client.post(COMPLETIONS, json=ask) for ask in asks))
        assert one.json()["id"] == two.json()["id"] == "cmpl-same"
        assert one.json()["choices"][0]["text"] != two.json()["choices"][0]["text"]

    asyncio.run(main())
