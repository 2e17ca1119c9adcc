"""`AsyncLLM`: many tasks, one engine. Whoever leaves gives everything back, whoever waits is answered."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from atoma_jax import LLM, AsyncLLM, EngineDeadError, Overloaded, RequestOutput, RequestOutputKind
from atoma_jax.errors import ParameterError
from tests.engine.conftest import BUCKETS, SIZES
from tests.engine.tasks import GREEDY, LONG, Serve, finish, idle, prompt_of
from tests.engine.traffic import Ask, random_asks, run_alone, same_output


def test_many_tasks_each_get_what_they_get_alone(llm: LLM, serve: Serve) -> None:
    asks = [ask for ask in random_asks(Random(5), 60) if ask.params.greedy]
    alone = [run_alone(llm.llm_engine, ask) for ask in asks]
    served = serve(policy="priority")

    async def task(index: int, ask: Ask) -> RequestOutput:
        await asyncio.sleep(0.002 * (index % 7))
        return await finish(served.generate(list(ask.prompt), ask.params, f"r{index}", priority=ask.priority))

    async def main() -> list[RequestOutput]:
        outputs = await asyncio.gather(*(task(index, ask) for index, ask in enumerate(asks)))
        await idle(served)
        return outputs

    for output, reference in zip(asyncio.run(main()), alone, strict=True):
        same_output(output, reference)


def test_outputs_come_as_their_kind_says(llm: LLM, serve: Serve) -> None:
    served = serve()

    async def main(kind: RequestOutputKind) -> list[RequestOutput]:
        params = replace(GREEDY, output_kind=kind)
        return [output async for output in served.generate(prompt_of(9), params, "r")]

    (final,) = asyncio.run(main(RequestOutputKind.FINAL_ONLY))
    cumulative = asyncio.run(main(RequestOutputKind.CUMULATIVE))
    deltas = asyncio.run(main(RequestOutputKind.DELTA))
    same_output(cumulative[-1], final)
    assert "".join(output.outputs[0].text for output in deltas) == final.outputs[0].text
    assert len(cumulative) == len(deltas) == 12


class TestLeaving:
    @pytest.mark.parametrize("after", [0, 1, 3])
    def test_a_cancelled_task_gives_its_pages_back(self, serve: Serve, after: int) -> None:
        served = serve()

        async def main() -> RequestOutput:
            seen = asyncio.Event()

            async def watch() -> None:
                count = 0
                if count == after:
                    seen.set()
                async for _ in served.generate(prompt_of(40), LONG, "leaves"):
                    count += 1
                    if count == after:
                        seen.set()

            task = asyncio.create_task(watch())
            other = asyncio.create_task(finish(served.generate(prompt_of(9), GREEDY, "stays")))
            await seen.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            output = await other
            await idle(served)
            return output

        assert len(asyncio.run(main()).outputs[0].token_ids) == 12

    def test_an_iterator_that_is_closed_early_gives_its_pages_back(self, serve: Serve) -> None:
        served = serve()

        async def main() -> None:
            outputs = served.generate(prompt_of(40), LONG, "r")
            async for _ in outputs:
                break
            await outputs.aclose()
            await idle(served)
            again = await finish(served.generate(prompt_of(9), GREEDY, "r"))  # the id is free again
            assert again.outputs[0].finish_reason == "length"

        asyncio.run(main())

    def test_a_loop_that_is_closed_takes_no_one_else_down(self, serve: Serve) -> None:
        served = serve()
        gone = asyncio.new_event_loop()
        outputs = served.generate(prompt_of(9), LONG, "gone")
        gone.run_until_complete(anext(outputs))
        reading = served.stats()
        gone.close()

        async def main() -> RequestOutput:
            output = await finish(served.generate(prompt_of(9), GREEDY, "stays"))
            await served.abort("gone")
            await idle(served)
            return output

        assert asyncio.run(main()).finished
        reading.close()
        with pytest.raises(StopIteration):
            outputs.aclose().send(None)

    def test_an_abort_hands_out_what_there_is(self, serve: Serve) -> None:
        served = serve()

        async def main() -> RequestOutput:
            async for output in served.generate(prompt_of(9), LONG, "r"):
                if len(output.outputs[0].token_ids) == 5:
                    await served.abort("r")
            await served.abort("r")
            await served.abort("never there")
            await idle(served)
            return output

        sample = asyncio.run(main()).outputs[0]
        assert sample.finish_reason == "abort"
        assert 5 <= len(sample.token_ids) < 80

    def test_an_abort_before_the_first_step(self, serve: Serve) -> None:
        served = serve()

        async def main() -> RequestOutput:
            task = asyncio.create_task(finish(served.generate(prompt_of(90), LONG, "r")))
            await asyncio.sleep(0)
            await served.abort("r")
            return await task

        assert asyncio.run(main()).outputs[0].finish_reason == "abort"


class TestRefusals:
    def test_a_bad_request_concerns_its_task_alone(self, serve: Serve) -> None:
        served = serve()

        async def main() -> None:
            good = asyncio.create_task(finish(served.generate(prompt_of(9), GREEDY, "good")))
            with pytest.raises(ParameterError, match="cannot be empty"):
                await finish(served.generate([], GREEDY, "bad"))
            assert (await good).finished

        asyncio.run(main())

    def test_an_id_in_use(self, serve: Serve) -> None:
        served = serve()

        async def main() -> None:
            first = served.generate(prompt_of(9), GREEDY, "r")
            await anext(first)
            with pytest.raises(ParameterError, match="'r' is in use"):
                await finish(served.generate(prompt_of(5), GREEDY, "r"))
            assert len((await finish(first)).outputs[0].token_ids) == 12

        asyncio.run(main())

    def test_a_full_queue(self, serve: Serve) -> None:
        served = serve(max_waiting=1, max_num_seqs=1)

        async def main() -> list[Any]:
            requests = [finish(served.generate(prompt_of(9, i), LONG, f"r{i}")) for i in range(8)]
            return await asyncio.gather(*requests, return_exceptions=True)

        outcomes = asyncio.run(main())
        refused = [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]
        served_ = [outcome for outcome in outcomes if isinstance(outcome, RequestOutput)]
        assert refused
        assert served_
        assert len(refused) + len(served_) == 8
        assert all(outcome.outputs[0].finish_reason == "length" for outcome in served_)


class TestSubmit:
    """What servers build on: outputs of several requests in one place."""

    def test_outputs_of_several_requests_come_in_one_queue(self, serve: Serve) -> None:
        served = serve()

        async def main() -> None:
            queue: asyncio.Queue[Any] = asyncio.Queue()
            times = [await served.submit(prompt_of(9, i), GREEDY, f"r{i}", queue.put_nowait) for i in range(3)]
            finished: set[str] = set()
            while len(finished) < 3:
                output = await queue.get()
                finished |= {output.request_id} if output.finished else set()
            assert finished == {"r0", "r1", "r2"}
            for metrics in times:  # the same objects that the engine fills in
                assert metrics.first_scheduled_time is not None
                assert metrics.num_generation_tokens == 12
            await idle(served)

        asyncio.run(main())

    def test_it_returns_only_what_was_taken(self, serve: Serve) -> None:
        served = serve()

        async def main() -> None:
            with pytest.raises(ParameterError, match="cannot be empty"):
                await served.submit([], GREEDY, "r", lambda item: None)
            assert not served._streams

        asyncio.run(main())

    def test_cancelling_it_gives_everything_back(self, serve: Serve) -> None:
        served = serve()

        async def main() -> None:
            gate = threading.Event()
            served._call(lambda: gate.wait(20) and None)
            task = asyncio.create_task(served.submit(prompt_of(9), LONG, "r", lambda item: None))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.set()
            await idle(served)

        asyncio.run(main())

    def test_a_lost_device_is_delivered(self, serve: Serve) -> None:
        served = serve(fails_at=3)

        async def main() -> None:
            queue: asyncio.Queue[Any] = asyncio.Queue()
            await served.submit(prompt_of(9), LONG, "r", queue.put_nowait)
            while not isinstance(item := await queue.get(), EngineDeadError):
                assert not item.finished

        asyncio.run(main())


def test_a_device_that_hangs_shows(serve: Serve) -> None:
    served = serve()
    asyncio.run(finish(served.generate(prompt_of(9), GREEDY, "r")))
    asyncio.run(idle(served))
    gate = threading.Event()
    served._call(lambda: gate.wait(20) and None)
    while served.busy_seconds < 0.01:
        time.sleep(0.001)
    gate.set()
    asyncio.run(idle(served))
    while served.busy_seconds:
        time.sleep(0.001)


def test_prefixes_are_forgotten_on_demand_and_kept_apart_by_salt(serve: Serve) -> None:
    served = serve()

    async def cached(salt: str | None = None) -> int:
        name = f"r{time.perf_counter_ns()}"
        return (await finish(served.generate(prompt_of(33), GREEDY, name, cache_salt=salt))).num_cached_tokens

    async def main() -> list[int]:
        found = [await cached(), await cached(), await cached("a"), await cached("a"), await cached("b")]
        await served.reset_prefix_cache()
        return [*found, await cached()]

    assert asyncio.run(main()) == [0, 32, 0, 32, 0, 0]


def test_a_profile_is_written(serve: Serve, tmp_path: Path) -> None:
    served = serve()

    async def main() -> None:
        with pytest.raises(RuntimeError):
            await served.stop_profile()
        await served.start_profile(str(tmp_path))
        with pytest.raises(RuntimeError):
            await served.start_profile(str(tmp_path))
        await finish(served.generate(prompt_of(9), GREEDY, "r"))
        await served.stop_profile()

    asyncio.run(main())
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_two_loops_share_an_engine(serve: Serve) -> None:
    served = serve()
    got: dict[int, list[RequestOutput]] = {}

    def run(thread: int) -> None:
        async def main() -> list[RequestOutput]:
            return await asyncio.gather(
                *(finish(served.generate(prompt_of(9, i), GREEDY, f"{thread}-{i}")) for i in range(6))
            )

        got[thread] = asyncio.run(main())

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(got[0], got[1], strict=True):
        assert one.request_id != other.request_id
        same_output(one, other)


def test_an_idle_engine_takes_no_step(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread waits until it is woken: it looks for work at most once for each call."""
    served = serve()
    asyncio.run(finish(served.generate(prompt_of(9), GREEDY, "r")))
    asyncio.run(idle(served))
    looked = 0
    wait_for = served._wake.wait_for

    def counted(predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        nonlocal looked
        looked += 1
        assert timeout is None, "it wakes up by itself"
        return wait_for(predicate, timeout)

    monkeypatch.setattr(served._wake, "wait_for", counted)
    asyncio.run(served.stats())
    steps = served._engine.stats().steps
    clock = time.pthread_getcpuclockid(served._thread.ident)
    before = time.clock_gettime_ns(clock)
    time.sleep(0.3)
    assert time.clock_gettime_ns(clock) - before < 5_000_000  # 5 ms at most for settling down
    assert looked <= 2  # once for the call, once if it was on its way to sleep
    assert served._engine.stats().steps == steps


def test_it_is_built_from_settings(tiny_path: Path) -> None:
    served = AsyncLLM.from_options(str(tiny_path), **SIZES, **BUCKETS)
    try:
        assert served.model_config.max_model_len == 96
        assert served.get_tokenizer().encode("Hi")
        output = asyncio.run(finish(served.generate("Hi", GREEDY, "r", cache_salt="s", priority=1)))
        assert output.prompt == "Hi"
        assert served.startup.total > 0
        assert asyncio.run(served.stats()).generation_tokens == 12
    finally:
        served.shutdown()
    assert served._engine._runner._weights is None, "the device's memory"
