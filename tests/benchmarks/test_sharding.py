"""The model of step times over meshes, and that the page shows what was compiled."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atoma_jax.ops.residual import is_cut
from bench.collectives import Collective, Piece
from bench.real_models import LLAMA_8B
from bench.sharding_report import alike, crossover, markdown, modelled
from bench.sharding_steps import MESHES, MODELS, PROGRAMS
from bench.step_model import Exchange, Machine, decode_load, exchange_at, prefill_load, step_time
from sharding.mesh import MeshShape, parse_mesh

DOCS = Path(__file__).parents[2] / "docs"
FREE = Machine(latency=0, nvlink=float("inf"))


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What is committed."""
    return json.loads((DOCS / "sharding.json").read_text(encoding="utf-8"))


def test_what_a_step_exchanges_is_told_apart() -> None:
    one = Piece("bf16", (8,))
    weights = Collective(kind="all-gather", axes=("fsdp",), devices=2, pieces=(one,), times=4)
    found = [
        weights,
        replace(weights, times=1),
        Collective(kind="all-reduce", axes=("tensor",), devices=2, pieces=(one,), times=8),
        Collective(kind="all-reduce", axes=("tensor",), devices=2, pieces=(one,), always=False),
        Collective(kind="collective-permute", axes=("tensor",), devices=2, pieces=(one,), times=4),
        Collective(kind="collective-permute", axes=("fsdp", "tensor"), devices=4, pieces=(one,)),
    ]
    exchange = Exchange.of(found, 4)
    rounds = {"rounds": 16, "rounds_calls": 1}
    assert exchange == Exchange(ahead=8, ahead_calls=1, waited=32, waited_calls=2, once=24, once_calls=2, **rounds)


def test_activations_grow_with_tokens_and_weights_do_not() -> None:
    """Of weights 100 bytes a layer, 3 a token in a layer, 5 before the layers, 7 a row behind them."""

    def exchange(tokens: int, rows: int) -> Exchange:
        return Exchange(ahead=100, ahead_calls=1, waited=3 * tokens, waited_calls=2, once=100 + 5 * tokens + 7 * rows)

    found = exchange_at((exchange(8, 8), exchange(512, 8)), (8, 512), 8, decode_load(64, 1024))
    assert found == exchange(64, 64)


def test_a_token_takes_the_time_of_reading_the_weights_and_many_that_of_products() -> None:
    read = 2 * 7.5e9 / 4.3e12  # bfloat16, without the embedding
    one = step_time(LLAMA_8B, MeshShape(), LLAMA_8B.vocab_size, decode_load(1, 1), Exchange(), FREE)
    assert one.total == one.local == pytest.approx(read, rel=0.01)
    many = step_time(LLAMA_8B, MeshShape(), LLAMA_8B.vocab_size, prefill_load(8192, 1024), Exchange(), FREE)
    assert many.total == pytest.approx(2 * 6.98e9 * 8192 / 990e12, rel=0.03)


def test_what_is_sent_ahead_or_goes_round_hides_behind_a_long_layer_and_what_is_waited_for_does_not() -> None:
    mesh, load, machine = MeshShape(fsdp=2), prefill_load(65536, 1024), Machine(latency=0)
    free = step_time(LLAMA_8B, mesh, LLAMA_8B.vocab_size, load, Exchange(), machine).total
    ahead = step_time(LLAMA_8B, mesh, LLAMA_8B.vocab_size, load, Exchange(ahead=118e6, rounds=100e6), machine)
    waited = step_time(LLAMA_8B, mesh, LLAMA_8B.vocab_size, load, Exchange(waited=218e6), machine)
    assert ahead.total == free
    assert waited.total == pytest.approx(free + 32 * 218e6 / 450e9)
    few = step_time(LLAMA_8B, mesh, LLAMA_8B.vocab_size, decode_load(1, 1), Exchange(ahead=218e6), machine)
    assert few.total > 32 * 218e6 / 450e9


def test_the_page_shows_what_was_compiled(results: dict[str, Any]) -> None:
    assert markdown(results) == (DOCS / "sharding.md").read_text(encoding="utf-8")
    assert results["models"].keys() <= MODELS.keys()
    for name, meshes in results["models"].items():
        assert tuple(meshes) == MESHES
        for mesh, found in meshes.items():
            steps = {program: Exchange(**found["programs"][str(program)]["exchange"]) for program in PROGRAMS}
            # What the model of other sizes stands on.
            assert len({step.ahead for step in steps.values()}) == 1
            decode = PROGRAMS[0]
            for program, step in steps.items():
                few, *_, many = alike(program.tokens, name, parse_mesh(mesh))
                assert few != many
                assert (step.waited_calls, step.rounds_calls) == (steps[few].waited_calls, steps[few].rounds_calls)
                assert step.waited / program.tokens == pytest.approx(steps[few].waited / few.tokens)
                assert step.rounds / program.tokens == pytest.approx(steps[few].rounds / few.tokens)
                # A sum of float32 that is cut, and a join of bfloat16: three quarters of a sum.
                sent = (step.waited + step.rounds) / program.tokens * decode.tokens
                share = 0.75 if parse_mesh(mesh).tensor > 1 and is_cut(program.tokens, parse_mesh(mesh)) else 1
                assert sent == pytest.approx(share * steps[decode].waited)
        whole, spread = meshes["data=1"], meshes["fsdp=8"]
        assert spread["weight_bytes"] == pytest.approx(whole["weight_bytes"] / 8, rel=0.05), name


def test_tensor_is_for_few_tokens_and_fsdp_for_many_over_many_devices(results: dict[str, Any]) -> None:
    machine = Machine(**results["inputs"])
    for name, meshes in results["models"].items():
        for devices in (2, 4, 8):
            assert crossover(name, meshes, machine, "decode", devices) is None
            found = crossover(name, meshes, machine, "mixed", devices)
            if found is None:  # what goes round hides behind products
                assert devices < 8
                continue
            for tokens, is_faster in ((found, True), (found - devices, False)):
                fsdp, tensor = (
                    modelled(name, mesh, meshes[mesh]["programs"], machine, "mixed", tokens).total
                    for mesh in (f"fsdp={devices}", f"tensor={devices}")
                )
                assert (fsdp < tensor) == is_faster
