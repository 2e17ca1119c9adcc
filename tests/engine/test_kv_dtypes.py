"""The engine over each type of KV cache. What a type keeps is tested in tests/pallas_kernels; here, that it is kept."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import jax
import numpy as np
import pytest

from atoma_jax import LLM, RequestOutput, SamplingParams
from atoma_jax.engine.engine import Engine
from tests.engine.conftest import SIZES
from tests.engine.inside import drained, kv_of, poison, preempt_one, published
from tests.engine.traffic import Ask, Drive, logprob_bits, run_all, run_alone, same_output

MakeEngine = Callable[..., Engine]

PARAMS = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=2)
ASKS = tuple(Ask(tuple(Random(seed).choices(range(3, 259), k=21 + 3 * seed)), PARAMS) for seed in range(10))
L, K, H, PAGE = 2, 2, 16, SIZES["block_size"]


# float32 is what all other tests run.
@pytest.fixture(
    scope="module",
    params=[*(pytest.param(one, marks=pytest.mark.slow) for one in ("bfloat16", "float16")), "fp8_e4m3", "int8"],
)
def kv_dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def llm(tiny_path: Path, kv_dtype: str) -> Iterator[LLM]:
    llm = LLM(str(tiny_path), **SIZES, deterministic=True, kv_cache_dtype=kv_dtype)
    yield llm
    assert llm.llm_engine.num_recompilations == 0
    llm.shutdown()


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[RequestOutput]:
    return [run_alone(llm.llm_engine, ask) for ask in ASKS]


def same_bits(one: RequestOutput, other: RequestOutput) -> None:
    same_output(one, other)
    assert logprob_bits(one) == logprob_bits(other)


def test_its_bytes_are_those_of_the_arrays(llm: LLM, kv_dtype: str) -> None:
    limits = llm.llm_engine.model_config
    arrays = kv_of(llm.llm_engine._runner)
    vector = {"bfloat16": 2 * H, "float16": 2 * H, "fp8_e4m3": H + 4, "int8": H + 4}[kv_dtype]
    assert limits.kv_cache_bytes == sum(array.nbytes for array in arrays)
    assert limits.kv_cache_bytes == limits.num_pages * PAGE * 2 * L * K * vector


def test_programs_take_it_over_and_neither_copy_nor_widen_it(llm: LLM) -> None:
    state = llm.llm_engine._runner._state
    shapes = {",".join(map(str, array.shape)) for array in kv_of(llm.llm_engine._runner)}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # Copies under a name of their own, and those that were fused with something else.
    copied = re.compile(rf"= \w+\[(?:{'|'.join(shapes)})\]\S* (?:copy|convert|bitcast-convert|transpose|select)\(")
    for program, future in llm.llm_engine._runner._programs.items():
        compiled = future.result()
        assert compiled.memory_analysis().alias_size_in_bytes == size, program
        assert not copied.findall(compiled.as_text()), program


def test_among_others_as_alone(llm: LLM, make_engine: MakeEngine, alone: list[RequestOutput]) -> None:
    engine = make_engine(llm)
    for output, reference in zip(run_all(engine, ASKS), alone, strict=True):
        same_bits(output, reference)
    drained(engine)


def test_a_cache_hit_as_a_miss(llm: LLM, make_engine: MakeEngine, alone: list[RequestOutput]) -> None:
    """Pages of the prefix cache keep their scales."""
    engine = make_engine(llm)
    for ask, reference in zip(ASKS, alone, strict=True):
        engine.reset_prefix_cache()
        run_all(engine, [dataclasses.replace(ask, prompt=(*ask.prompt, 7))])
        (output,) = run_all(engine, [ask])
        assert output.num_cached_tokens == (len(ask.prompt) - 1) // PAGE * PAGE
        same_bits(output, reference)


def test_preemption_changes_no_token(llm: LLM, make_engine: MakeEngine, alone: list[RequestOutput]) -> None:
    engine = make_engine(llm)
    drive = Drive(engine, ASKS)
    for index in range(len(ASKS)):
        drive.add(index)
    rng = Random(2)
    while engine.has_work:
        drive.step()
        if drive.num_steps % 3 == 0:
            preempt_one(engine, rng, spare=1)
    assert engine.stats().preemptions > 5
    for output, reference in zip(drive.outputs, alone, strict=True):
        same_output(output, reference)


def test_nan_ends_its_row_alone(llm: LLM, make_engine: MakeEngine, alone: list[RequestOutput]) -> None:
    engine = make_engine(llm)
    drive = Drive(engine, ASKS[:3])
    for index in range(3):
        drive.add(index)
    for _ in range(8):
        drive.step()
    poison(engine._runner, 0)
    poison(engine._runner, engine._requests["r1"].samples[0].seq.pages[-1])
    drive.drain()
    assert drive.done[1].outputs[0].finish_reason == "error"
    for index in (0, 2):
        same_bits(drive.done[index], alone[index])
    drained(engine)
    for array in kv_of(engine._runner)[2:]:  # scales
        assert np.isfinite(array[:, list(published(engine).values())]).all()
    engine.reset_prefix_cache()
    for output, reference in zip(run_all(engine, ASKS), alone, strict=True):
        same_bits(output, reference)  # whoever gets the pages next
