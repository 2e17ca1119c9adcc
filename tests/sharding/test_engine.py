"""An engine on a mesh: answers of one device, memory as planned, and runners that follow it.

All of it in one file, which one worker runs: what takes time is compiling.
"""

import asyncio
import copy
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np
import pytest

from atoma_jax import LLM, AsyncLLM, EngineDeadError, SamplingParams, plan_model
from atoma_jax.config import EngineConfig
from atoma_jax.engine.engine import Engine
from atoma_jax.engine.grammars import has_llguidance
from atoma_jax.engine.runner import Runner
from atoma_jax.errors import ConfigError
from atoma_jax.ops import residual, ring
from sharding.plan import allocated_bytes
from tests.engine.test_cluster import PATIENCE, cluster_on
from tests.engine.traffic import answers_alike, bound_asks, greedy, random_asks, run_all, same_output
from tests.sharding.programs import write_model

MESHES = ("fsdp=2,tensor=2", "tensor=2", "fsdp=2", "data=2", "tensor=4", "tensor=8", "data=2,fsdp=2,tensor=2")
QUICK = ("fsdp=2,tensor=2",)  # all of it at once: slices, weights that are gathered, heads and vocabulary that are cut
SIZES: dict[str, Any] = {
    "dtype": "float32",
    "kernels": "xla",
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "score_tokens": 16,
    "block_size": 8,
    "num_pages": 16,  # of each slice: too few, so that some are preempted
    "decode_rows": (4,),
    "prefill_tokens": (32,),
}
meshes = pytest.mark.parametrize(
    "mesh", [mesh if mesh in QUICK else pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES]
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine_of(path: Path) -> Callable[[str | None], LLM]:
    """An engine on a mesh, started once. Its mixed steps are as large ones: their stream is cut, and goes round."""
    started: dict[str | None, LLM] = {}

    def start(mesh: str | None) -> LLM:
        if mesh not in started:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(residual, "CUT_TOKENS", SIZES["max_num_batched_tokens"])
                patch.setattr(ring, "RING_NUMBERS", SIZES["max_num_batched_tokens"])
                started[mesh] = LLM(str(path), mesh=mesh, **SIZES)
        started[mesh].reset_prefix_cache()
        started[mesh].reset_stats()
        return started[mesh]

    return start


@meshes
def test_answers_are_those_of_one_device(mesh: str, engine_of: Callable[[str | None], LLM]) -> None:
    """Of random requests of every kind, many at once: some are preempted, some find their prefixes."""
    asks = random_asks(Random(7), 24)
    asks[::2] = [greedy(ask) for ask in asks[::2]]
    want = run_all(engine_of(None).llm_engine, asks)
    answers_alike(engine_of(mesh), asks, want)


@meshes
def test_structured_answers_are_those_of_one_device(mesh: str, engine_of: Callable[[str | None], LLM]) -> None:
    """Bits of allowed tokens go to the slots of every slice, and each device reads those of its own tokens."""
    pytest.importorskip("llguidance", reason="needs the extra `server`: llguidance")
    asks = bound_asks(4)
    want = run_all(engine_of(None).llm_engine, asks)
    llm = engine_of(mesh)
    for one, other in zip(want, run_all(llm.llm_engine, asks), strict=True):
        same_output(one, other)
    assert llm.stats().recompilations == 0


@meshes
def test_a_request_that_is_aborted_leaves_nothing(mesh: str, engine_of: Callable[[str | None], LLM]) -> None:
    engine = engine_of(mesh).llm_engine
    for index, ask in enumerate(random_asks(Random(3), 24)):
        engine.add_request(f"r{index}", list(ask.prompt), ask.params)
    for _ in range(4):
        engine.step()
    for index in range(24):  # some run, some wait in a slice, some have none yet
        engine.abort_request(f"r{index}")
    while engine.has_work:
        engine.step()
    engine.check_integrity()
    gauges = engine.scheduler_stats()
    assert (gauges.num_running, gauges.num_waiting, gauges.pages_owned) == (0, 0, 0)


@meshes
def test_every_device_holds_what_was_planned(mesh: str, path: Path, engine_of: Callable[[str | None], LLM]) -> None:
    llm = engine_of(mesh)
    runner = llm.llm_engine._runner
    config = EngineConfig.from_options({"model": str(path), "mesh": mesh, **SIZES})
    planned = plan_model(config, progress=False)
    assert runner._state is not None
    weights, pages = allocated_bytes(runner._weights), allocated_bytes(runner._state.pages)
    assert len(weights) == len(pages) == len(runner._state.pages.k.sharding.device_set)
    assert set(weights.values()) == {planned.weight_bytes}
    assert set(pages.values()) == {planned.kv_bytes_per_token * SIZES["block_size"] * SIZES["num_pages"]}
    workspace = llm.startup.device_bytes.pop("workspace")
    assert workspace[0] == workspace[1] > 0  # a CPU reserves none: what its programs need is what is planned
    assert llm.startup.device_bytes == {
        "weights": (planned.weight_bytes, planned.weight_bytes),
        "KV cache": (llm.llm_engine.model_config.kv_cache_bytes, next(iter(pages.values()))),
    }


class TestSeveralProcesses:
    """Played by runners of this one, which share weights and programs."""

    def test_a_follower_holds_what_the_leader_holds(
        self, engine_of: Callable[[str | None], LLM], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Bit for bit, on every device."""
        leader = engine_of(QUICK[0]).llm_engine
        runners = [leader._runner, twin(leader._runner)]
        for process, (runner, sock) in enumerate(zip(runners, socket.socketpair(), strict=True)):
            cluster = cluster_on(sock, process)
            monkeypatch.setattr(runner, "_cluster", cluster)
            monkeypatch.setattr(runner, "_run", cluster.run)
        thread = threading.Thread(target=runners[1].follow)
        thread.start()
        asks = random_asks(Random(5), 12)  # of every kind: with rules, scores, penalties
        asks += bound_asks(2) if has_llguidance() else []
        before = np.asarray(leader._runner._state.sampler.last_token)
        run_all(leader, asks)
        assert not np.array_equal(before, leader._runner._state.sampler.last_token)
        leader._runner._cluster.close()
        thread.join(PATIENCE)
        for one, other in zip(*(jax.tree.leaves(runner._state) for runner in runners), strict=True):
            np.testing.assert_array_equal(one, other)

    def test_an_idle_engine_notices_that_another_process_is_lost(self, engine_of: Callable[[str | None], LLM]) -> None:
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

        started, ends = engine_of(QUICK[0]), socket.socketpair()
        of = started.llm_engine
        runner, other = twin(of._runner), cluster_on(ends[1], 1)
        runner._cluster = cluster_on(ends[0], 0)
        engine = Engine(
            *(of.tokenizer, of._scheduler, runner, of._sampler, of.model_config),
            pipelined=True,
            seed=0,
            default_params=of.default_params,
        )
        asyncio.run(asyncio.wait_for(wait_for_the_end(), PATIENCE))


def twin(runner: Runner) -> Runner:
    """Another one of the same weights and programs, with a state of its own, which may be closed."""
    other = copy.copy(runner)
    other._programs = dict(runner._programs)
    other._state = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), leaf.sharding), runner._state)
    return other


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"mesh": "tensor=16"}, "needs 16 devices and there are 8"),
            ({"mesh": "tensor=3"}, "must divide ffn_dim = 512 of the model: 1, 2, 4, 8"),
            ({"mesh": "expert=2"}, "has no experts"),
            ({"mesh": "tensor=8", "weight_layout": "planar"}, "inputs lie in blocks of .*: tensor may be 1, 2, 4, got"),
            ({"mesh": "tensor=2", "kernels": "native"}, "run on one device, and the mesh is tensor=2"),
            ({"mesh": "tensor"}, None),
        ],
    )
    def test_what_cannot_be_cut_is_refused_from_headers(
        self, options: dict[str, Any], says: str | None, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*_: Any, **__: Any) -> None:
            raise AssertionError("weights are read")

        monkeypatch.setattr("atoma_jax.engine.model_setup.load_weights", load)
        monkeypatch.setattr("atoma_jax.engine.runner.jax.jit", load)  # nor is anything compiled
        if says is None:
            plan_model(EngineConfig.from_options({"model": str(path), **options}), progress=False)
            return
        with pytest.raises(ConfigError, match=says):
            LLM(str(path), **{**SIZES, **options})


def test_a_plan_for_devices_that_are_not_there_adds_up(path: Path) -> None:
    def weights(mesh: str | None) -> dict[str, int]:
        config = EngineConfig.from_options({"model": str(path), "mesh": mesh, "kernels": "xla"})
        return dict(plan_model(config, progress=False).weights)

    whole, spread = weights(None), weights("fsdp=16")
    matrices = [name for name in whole if not name.endswith("norm") and name != "embed"]
    assert {name: spread[name] * 16 for name in matrices} == {name: whole[name] for name in matrices}
    assert jax.device_count() < 16
