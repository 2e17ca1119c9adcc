"""An `AsyncLLM` that ends, by itself or with its device: everybody who waits hears of it."""

import asyncio
import threading
import time

import pytest

from atoma_jax import EngineDeadError
from tests.engine.tasks import GREEDY, LONG, Serve, finish, prompt_of


class TestTheEnd:
    def test_a_lost_device_is_heard_of_by_everyone(self, serve: Serve) -> None:
        served = serve(fails_at=6)

        async def main() -> None:
            await served.check_health()
            assert not served.is_dead
            requests = [finish(served.generate(prompt_of(30, i), LONG, f"r{i}")) for i in range(8)]
            outcomes = await asyncio.gather(*requests, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [EngineDeadError] * 8
            assert served.is_dead
            for later in (
                served.check_health(),
                finish(served.generate(prompt_of(9), GREEDY, "later")),
                served.abort("r0"),
                served.stats(),
            ):
                with pytest.raises(EngineDeadError, match="the device is gone"):
                    await later

        asyncio.run(main())

    @pytest.mark.parametrize("noticed", ["in a step", "between steps"])
    def test_a_lost_process_is_heard_of_by_everyone(
        self, serve: Serve, monkeypatch: pytest.MonkeyPatch, noticed: str
    ) -> None:
        """Another thread tells of it, too, while a step fails, or in front of a request that comes in."""
        held, go = threading.Event(), threading.Event()
        served = serve()

        def fail() -> None:
            raise EngineDeadError("process 1 is lost")

        def hold() -> None:
            held.set()
            go.wait(20)

        async def main() -> None:
            asked = finish(served.generate(prompt_of(5), GREEDY, "r"))
            monkeypatch.setattr(served._engine, "check", fail)
            if noticed == "in a step":
                monkeypatch.setattr(served._engine, "step", lambda: (hold(), fail()))
                task = asyncio.create_task(asked)
                await asyncio.to_thread(held.wait, 20)
                served._on_lost()
            else:
                served._call(hold)
                await asyncio.to_thread(held.wait, 20)
                served._on_lost()
                task = asyncio.create_task(asked)
                while len(served._calls) < 2:
                    await asyncio.sleep(0.001)
            go.set()
            with pytest.raises(EngineDeadError, match="process 1 is lost"):
                await asyncio.wait_for(task, 20)

        asyncio.run(main())

    def test_cancelling_while_the_engine_dies_stays_a_cancellation(self, serve: Serve) -> None:
        served = serve(fails_at=1)

        async def main() -> None:
            outputs = served.generate(prompt_of(9), LONG, "r")
            task = asyncio.create_task(anext(outputs))
            while not served.is_dead:
                await asyncio.sleep(0)
                time.sleep(0.001)  # the loop must not take in the error before it cancels
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())

    def test_a_fault_of_the_thread_is_heard_of_too(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        served = serve()

        def fail() -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(served._engine, "step", fail)

        async def main() -> None:
            with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
                await finish(served.generate(prompt_of(9), GREEDY, "r"))

        asyncio.run(main())

    def test_shutdown_with_unfinished_requests(self, serve: Serve) -> None:
        served = serve()

        async def main() -> None:
            outputs = served.generate(prompt_of(9), LONG, "r")
            await anext(outputs)
            await asyncio.to_thread(served.shutdown)
            with pytest.raises(EngineDeadError, match="was shut down"):
                await finish(outputs)
            with pytest.raises(EngineDeadError, match="was shut down"):
                await finish(served.generate(prompt_of(9), GREEDY, "later"))
            with pytest.raises(EngineDeadError, match="was shut down"):
                await served.check_health()

        asyncio.run(main())
        assert served._engine.scheduler_stats().pages_owned == 0
        assert not served._thread.is_alive()
        served.shutdown()
