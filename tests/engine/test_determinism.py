"""deterministic=True: outputs are bit-equal whatever else is served, wherever a request runs, however it is cut."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from atoma_jax import LLM, RequestOutput, SamplingParams
from atoma_jax.config import CompileConfig
from atoma_jax.engine.buckets import Program
from atoma_jax.engine.engine import Engine
from atoma_jax.engine.plan import StepPlan
from tests.engine.conftest import BUCKETS, SIZES
from tests.engine.inside import drained, preempt_one
from tests.engine.traffic import Ask, Drive, logprob_bits, random_asks, run_all, run_alone, same_output

pytestmark = pytest.mark.optimized

MakeEngine = Callable[..., Engine]


def with_logprobs(ask: Ask) -> Ask:
    return dataclasses.replace(ask, params=dataclasses.replace(ask.params, logprobs=3))


def same_bits(one: RequestOutput, other: RequestOutput) -> None:
    same_output(one, other)
    assert logprob_bits(one) == logprob_bits(other)


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    """Greedy and sampled, of all kinds."""
    return [with_logprobs(ask) for ask in random_asks(Random(11), 40)]


@pytest.fixture(scope="module")
def alone(shared_deterministic_llm: LLM, asks: list[Ask]) -> list[RequestOutput]:
    return [run_alone(shared_deterministic_llm.llm_engine, ask) for ask in asks]


@pytest.mark.parametrize("pipelined", [True, False])
@pytest.mark.parametrize("order", [0, 1])
def test_among_others_as_alone(
    deterministic_llm: LLM,
    make_engine: MakeEngine,
    asks: list[Ask],
    alone: list[RequestOutput],
    order: int,
    pipelined: bool,
) -> None:
    """Other neighbours, rows, slots and prefix hits in each order."""
    rng = Random(order)
    engine = make_engine(deterministic_llm, pipelined=pipelined)
    drive = Drive(engine, asks)
    waiting = rng.sample(range(len(asks)), len(asks))
    while waiting or engine.has_work:
        for _ in range(min(len(waiting), rng.choice((0, 1, 2)))):
            drive.add(waiting.pop())
        drive.step()
    for output, reference in zip(drive.outputs, alone, strict=True):
        same_output(output, reference)
        if output.metrics.num_preemptions == 0:
            same_bits(output, reference)
    drained(engine)


def test_nothing_is_preempted(
    deterministic_llm: LLM, make_engine: MakeEngine, asks: list[Ask], alone: list[RequestOutput]
) -> None:
    """What decode computed, prefill would round otherwise: a request is admitted when its longest answer has room."""
    engine = make_engine(deterministic_llm)
    outputs = run_all(engine, asks)
    assert engine.stats().preemptions == 0
    for output, reference in zip(outputs, alone, strict=True):
        same_bits(output, reference)
    drained(engine)


def test_a_cache_hit_as_a_miss(
    deterministic_llm: LLM, make_engine: MakeEngine, asks: list[Ask], alone: list[RequestOutput]
) -> None:
    engine = make_engine(deterministic_llm)
    hits = 0
    for ask, reference in zip(asks[:15], alone, strict=False):
        engine.reset_prefix_cache()
        run_all(engine, [dataclasses.replace(ask, prompt=(*ask.prompt, 7))])  # all of the prompt is cached
        (output,) = run_all(engine, [ask])
        hits += output.num_cached_tokens
        same_bits(output, reference)
    assert hits > 200


def test_an_answer_in_the_next_prompt_is_computed_anew(deterministic_llm: LLM, make_engine: MakeEngine) -> None:
    """Decode computed its keys and values, and rounds otherwise than prefill: only prompts are shared."""
    engine = make_engine(deterministic_llm)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=3)
    for seed in range(4):
        prompt = tuple(Random(seed).choices(range(3, 259), k=21 + seed))
        engine.reset_prefix_cache()
        (answer,) = run_all(engine, [Ask(prompt, params)])
        turn = Ask((*prompt, *answer.outputs[0].token_ids, 7, 8, 9), params)
        (second,) = run_all(engine, [turn])
        assert second.num_cached_tokens > 0
        same_bits(second, run_alone(engine, turn))


@pytest.mark.slow  # an engine of its own, whose programs nobody else runs, to show what the option is for
def test_without_it_bits_depend_on_what_else_is_served(
    tiny_path: Path, make_engine: MakeEngine, asks: list[Ask]
) -> None:
    """The tests above would see it: other programs run other numbers of rows, whose sums XLA rounds differently. (The
    native kernels do not.)"""
    llm = LLM(str(tiny_path), **SIZES | {"cpu_precision": "default"}, **BUCKETS, kernels="xla")
    chosen = [ask for ask in asks if ask.params.greedy][:12]
    apart = [logprob_bits(run_alone(make_engine(llm), ask)) for ask in chosen]
    together = [logprob_bits(output) for output in run_all(make_engine(llm), chosen)]
    llm.shutdown()
    assert apart != together


@pytest.mark.parametrize("every", [2, 5])
def test_preemption_changes_no_token(
    deterministic_llm: LLM, make_engine: MakeEngine, asks: list[Ask], alone: list[RequestOutput], every: int
) -> None:
    engine = make_engine(deterministic_llm)
    drive = Drive(engine, asks[:20])
    for index in range(20):
        drive.add(index)
    rng = Random(every)
    while engine.has_work:
        drive.step()
        if drive.num_steps % every == 0:
            preempt_one(engine, rng, spare=1)
    assert engine.stats().preemptions > 10
    for output, reference in zip(drive.outputs, alone, strict=False):
        same_output(output, reference)


def test_decodes_never_run_in_the_program_of_prefills(
    deterministic_llm: LLM, asks: list[Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other number of rows may round otherwise; whether it does depends on the model's sizes."""
    runner = deterministic_llm.llm_engine._runner
    call, plans = runner._call, []

    def noted(parts: tuple[StepPlan, ...], program: Program) -> object:
        plans.extend(parts)
        return call(parts, program)

    monkeypatch.setattr(runner, "_call", noted)
    run_all(deterministic_llm.llm_engine, asks[:10])
    assert any(plan.decodes for plan in plans)
    assert any(plan.prefills for plan in plans)
    assert not any(plan.decodes and plan.prefills for plan in plans)


def test_it_pins_one_program_of_each_kind(deterministic_llm: LLM) -> None:
    assert [str(program) for program in deterministic_llm.llm_engine._runner.buckets.programs] == [
        "mixed-32x4",
        "decode-4x4",
        "score-16x4",
    ]
    assert CompileConfig().deterministic is False


class TestSeeds:
    """A sampled token depends on seed, position and sample index alone."""

    PARAMS = SamplingParams(temperature=1, seed=42, max_tokens=12, ignore_eos=True, logprobs=1)

    def test_samples_of_one_request_are_those_of_larger_ones(self, deterministic_llm: LLM) -> None:
        engine = deterministic_llm.llm_engine
        prompt = tuple(range(20, 50))
        many = run_alone(engine, Ask(prompt, dataclasses.replace(self.PARAMS, n=4)))
        few = run_alone(engine, Ask(prompt, dataclasses.replace(self.PARAMS, n=2)))
        one = run_alone(engine, Ask(prompt, self.PARAMS))
        assert many.outputs[:2] == few.outputs
        assert many.outputs[:1] == one.outputs
        assert len({tuple(sample.token_ids) for sample in many.outputs}) == 4

    def test_going_on_after_the_answer_so_far_draws_what_was_to_come(self, deterministic_llm: LLM) -> None:
        engine = deterministic_llm.llm_engine
        prompt = tuple(range(20, 50))
        whole = run_alone(engine, Ask(prompt, self.PARAMS)).outputs[0].token_ids
        rest = run_alone(engine, Ask((*prompt, *whole[:5]), dataclasses.replace(self.PARAMS, max_tokens=7)))
        assert rest.outputs[0].token_ids == whole[5:]
