"""A runner that follows another one does what that one does: its devices hold the same afterwards, bit for bit."""

import asyncio
import socket
import threading
from random import Random

import jax
import numpy as np
import pytest

from atoma_jax import LLM, AsyncLLM, EngineDeadError, SamplingParams
from atoma_jax.engine.cluster import Cluster
from atoma_jax.engine.runner import Runner
from tests.engine.test_cluster import PATIENCE, cluster_on
from tests.engine.traffic import random_asks, run_all
from tests.sharding.test_engine import SIZES
from tests.tiny_model import write_tiny_llama


def give(runner: Runner, cluster: Cluster) -> None:
    """As if it had been started with it."""
    runner._cluster, runner._run = cluster, cluster.run


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> list[LLM]:
    """Two of one model; the second one is lost with the last test."""
    path = tmp_path_factory.mktemp("tiny") / "m.gguf"
    write_tiny_llama(path, embedding_scale=0.35, width=256, heads=(8, 2))
    return [LLM(str(path), mesh="fsdp=2,tensor=2", **SIZES) for _ in range(2)]


def test_a_follower_holds_what_the_leader_holds(engines: list[LLM]) -> None:
    leader, follower = engines
    runners = [leader.llm_engine._runner, follower.llm_engine._runner]
    for process, (runner, sock) in enumerate(zip(runners, socket.socketpair(), strict=True)):
        give(runner, cluster_on(sock, process))
    thread = threading.Thread(target=runners[1].follow)
    thread.start()
    run_all(leader.llm_engine, random_asks(Random(5), 12))  # of every kind: with rules, scores, penalties
    cluster = runners[0]._cluster
    assert cluster is not None
    cluster.close()
    thread.join(PATIENCE)
    for one, other in zip(*(jax.tree.leaves(runner._state) for runner in runners), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_idle_engine_notices_that_another_process_is_lost(engines: list[LLM]) -> None:
    async def wait_for_the_end() -> None:
        llm = AsyncLLM(engine, started.startup)
        await llm.check_health()
        other.close("process 1 failed: its machine is gone")
        while not llm.is_dead:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineDeadError, match="its machine is gone"):
            await llm.check_health()
        with pytest.raises(EngineDeadError, match="its machine is gone"):
            async for _ in llm.generate("the cat", SamplingParams(), "r"):
                pass

    started, ends = engines[1], socket.socketpair()
    engine = started.llm_engine
    give(engine._runner, cluster_on(ends[0], 0))
    other = cluster_on(ends[1], 1)
    asyncio.run(asyncio.wait_for(wait_for_the_end(), PATIENCE))
