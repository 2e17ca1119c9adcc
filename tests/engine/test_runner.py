"""The compiled programs: padding writes to the scratch page alone, and nothing compiles once they are there."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random

import numpy as np
import pytest

from atoma_jax import LLM, SamplingParams
from atoma_jax.engine.compilations import COMPILATIONS
from atoma_jax.engine.engine import Engine
from atoma_jax.engine.plan import StepPlan, Work
from atoma_jax.engine.sampling_rows import encode
from atoma_jax.engine.sequence import Sequence
from tests.engine.inside import drained, kv_of, set_kv
from tests.engine.traffic import Drive, random_asks, run_all

PAGE = 8


def sequence(slot: int, length: int, pages: list[int], prompt_logprobs: int | None = None) -> Sequence:
    params = SamplingParams(temperature=0, prompt_logprobs=prompt_logprobs)
    seq = Sequence(request_id=str(slot), index=0, tokens=Random(slot).choices(range(3, 259), k=length), params=params)
    seq.slot, seq.pages = slot, pages
    return seq


def decode(slot: int, position: int, pages: list[int]) -> Work:
    return Work(sequence(slot, position + 1, pages), position, 1, True, False, False, True, 0)


def prefill(slot: int, start: int, count: int, pages: list[int]) -> Work:
    return Work(sequence(slot, start + count, pages), start, count, True, False, False, True, 0)


def score(slot: int, start: int, count: int, pages: list[int]) -> Work:
    return Work(sequence(slot, start + count + 1, pages, 1), start, count, False, True, False, True, 0)


# Positions that the step writes, by the program that runs it. None is full.
PLANS = {
    "decode-1x1": StepPlan((decode(2, 19, [4, 9, 7]),), ()),
    "decode-4x4": StepPlan((decode(0, 8, [5, 6]), decode(3, 0, [8]), decode(1, 23, [1, 2, 3])), ()),
    "mixed-16x4": StepPlan((decode(3, 12, [4, 5]),), (prefill(0, 0, 9, [6, 7]), prefill(2, 11, 2, [8, 9]))),
    "mixed-32x4": StepPlan((), (prefill(1, 0, 17, [3, 1, 2]), prefill(0, 3, 6, [9, 8]))),
    "score-16x4": StepPlan((), (score(1, 4, 7, [2, 5]), score(3, 0, 3, [6]))),
}


class TestPadding:
    @pytest.mark.parametrize("name", PLANS)
    def test_pages_that_a_step_does_not_write_stay_bit_identical(self, llm: LLM, name: str) -> None:
        runner, plan = llm.llm_engine._runner, PLANS[name]
        rng = np.random.default_rng(0)
        before = [rng.normal(size=array.shape).astype(array.dtype) for array in kv_of(runner)]
        set_kv(runner, before)
        for work in plan.works:
            runner.take_slot(work.seq.slot, encode(work.seq.params, slot=work.seq.slot, seed=0), None, [], [])
        assert str(runner.buckets.choose(plan)) == name
        runner.launch(plan).read()
        written = {
            (work.seq.pages[position // PAGE], position % PAGE)
            for work in plan.works
            for position in range(work.start, work.end)
        }
        for old, new in zip(before, kv_of(runner), strict=True):
            changed = (old != new).any(axis=(0, 2, 4))  # [P, S]
            assert {(page, slot) for page, slot in np.argwhere(changed).tolist() if page != 0} == written

    def test_every_program_was_looked_at(self, llm: LLM) -> None:
        assert {str(program) for program in llm.llm_engine._runner.buckets.programs} == set(PLANS)

    @pytest.mark.parametrize("name", PLANS)
    def test_what_padding_holds_changes_nothing(self, llm: LLM, name: str) -> None:
        """Slots of rows that are not in the step keep their last token."""
        runner, plan = llm.llm_engine._runner, PLANS[name]
        for work in plan.works:
            runner.take_slot(work.seq.slot, encode(work.seq.params, slot=work.seq.slot, seed=0), None, [], [])
        before = np.array(runner._state.sampler.last_token)
        output = runner.launch(plan).read()
        after = np.array(runner._state.sampler.last_token)
        slots = [work.seq.slot for work in plan.sampling]
        assert after[slots].tolist() == output.tokens[: len(slots)].tolist()
        others = [slot for slot in range(4) if slot not in slots]
        assert after[others].tolist() == before[others].tolist()


class TestCompilations:
    def test_random_traffic_after_ready_compiles_nothing(self, llm: LLM, make_engine: Callable[..., Engine]) -> None:
        """Every setting of a request, every program, preemption, aborts."""
        engine = make_engine(llm, policy="priority")
        rng = Random(9)
        drive = Drive(engine, random_asks(rng, 60))
        for index in range(60):
            drive.add(index)
        while engine.has_work:
            drive.step()
            if drive.num_steps % 20 == 0:
                drive.abort(rng.randrange(60))
        assert engine.num_recompilations == 0
        drained(engine)

    def test_a_compilation_is_counted(self, llm: LLM) -> None:
        import jax
        import jax.numpy as jnp

        engine = llm.llm_engine
        assert engine.num_recompilations == 0
        jax.jit(lambda x: x * 3 + 17)(jnp.arange(173)).block_until_ready()
        assert engine.num_recompilations > 0
        assert engine.stats().recompilations == engine.num_recompilations
        engine.reset_stats()

    def test_what_another_engine_compiles_as_it_starts_is_not(self, llm: LLM) -> None:
        import jax
        import jax.numpy as jnp

        with ThreadPoolExecutor(1, initializer=COMPILATIONS.plan_this_thread) as pool:
            programs = COMPILATIONS.programs
            pool.submit(lambda: jax.jit(lambda x: x * 3 + 19)(jnp.arange(179)).block_until_ready()).result()
        assert COMPILATIONS.programs > programs
        assert llm.llm_engine.num_recompilations == 0

    def test_programs_are_chosen_by_what_a_step_holds(self, llm: LLM, make_engine: Callable[..., Engine]) -> None:
        used: set[str] = set()
        buckets = llm.llm_engine._runner.buckets
        engine = make_engine(llm)
        launch = engine._runner.launch

        def noted(plan: StepPlan) -> object:
            used.add(str(buckets.choose(plan)))
            return launch(plan)

        engine._runner.launch = noted  # type: ignore[method-assign]
        try:
            run_all(engine, random_asks(Random(4), 20))
        finally:
            del engine._runner.launch
        assert used == set(PLANS)
