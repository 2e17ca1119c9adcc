"""The engine as a whole: a request comes to what it comes to alone whatever else is served, and all pages come back."""

from collections.abc import Callable
from random import Random

import numpy as np
import pytest

from atoma_jax import LLM, RequestOutput, SamplingParams
from atoma_jax.engine.engine import Engine
from tests.engine.inside import drained, kv_of, preempt_one, published, set_kv
from tests.engine.traffic import Ask, Drive, random_asks, run_all, run_alone, same_output

MakeEngine = Callable[..., Engine]

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return Random(seed).choices(range(3, 259), k=length)


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    return random_asks(Random(1), 200)


@pytest.fixture(scope="module")
def alone(shared_llm: LLM, asks: list[Ask]) -> dict[int, RequestOutput]:
    """What the greedy ones come to on their own; test_determinism.py compares the sampled ones."""
    engine = shared_llm.llm_engine
    return {index: run_alone(engine, ask) for index, ask in enumerate(asks) if ask.params.greedy}


class TestTraffic:
    @pytest.mark.parametrize("pipelined", [True, False])
    def test_each_greedy_request_gets_what_it_gets_alone(
        self, llm: LLM, make_engine: MakeEngine, asks: list[Ask], alone: dict[int, RequestOutput], pipelined: bool
    ) -> None:
        """200 requests of all kinds with aborts, preemptions and prefix hits."""
        rng = Random(2)
        engine = make_engine(llm, pipelined=pipelined, policy="priority")
        drive = Drive(engine, asks)
        waiting = list(range(len(asks)))
        aborts = {index for index in waiting if rng.random() < 0.1}
        while waiting or engine.has_work:
            for _ in range(min(len(waiting), rng.choice((0, 0, 1, 3)))):
                drive.add(waiting.pop(0))
            drive.step()
            if rng.random() < 0.05:
                preempt_one(engine, rng)
            if aborts and rng.random() < 0.05:
                drive.abort(aborts.pop())
            if drive.num_steps % 16 == 0:
                engine.check_integrity()
        drained(engine)
        stats = engine.stats()
        assert stats.preemptions > 20
        assert stats.prefix_hit_tokens > 500
        assert stats.recompilations == 0
        assert drive.aborted
        for index, reference in alone.items():
            output = drive.done[index]
            if index not in drive.aborted:
                same_output(output, reference)
            for sample, whole in zip(output.outputs, reference.outputs, strict=True):
                assert sample.token_ids == whole.token_ids[: len(sample.token_ids)]

    @pytest.mark.parametrize("every", [1, 3, 7])
    def test_preemption_every_few_steps_changes_no_token(
        self, llm: LLM, make_engine: MakeEngine, asks: list[Ask], alone: dict[int, RequestOutput], every: int
    ) -> None:
        chosen = [index for index in alone if asks[index].params.n == 1][:12]
        engine = make_engine(llm)
        drive = Drive(engine, [asks[index] for index in chosen])
        for place in range(len(chosen)):
            drive.add(place)
        rng = Random(every)
        while engine.has_work:
            drive.step()
            if drive.num_steps % every == 0:  # the first is spared, or nothing ends where every step preempts
                preempt_one(engine, rng, spare=1)
        assert engine.stats().preemptions > 5
        for output, index in zip(drive.outputs, chosen, strict=True):
            same_output(output, alone[index])
        drained(engine)

    @pytest.mark.parametrize(
        "limits",
        [
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 32},
            {"enable_prefix_caching": False},
            {"num_pages": 13},  # room for one sequence of full length
            {"max_prefill_rows": 1},
        ],
        ids=["whole prompts", "no prefix cache", "one sequence of pages", "one prefill a step"],
    )
    def test_the_schedule_changes_no_token(
        self, llm: LLM, make_engine: MakeEngine, asks: list[Ask], alone: dict[int, RequestOutput], limits: dict
    ) -> None:
        chosen = [index for index in alone if len(asks[index].prompt) <= 32][:20]
        engine = make_engine(llm, **limits)
        for output, index in zip(run_all(engine, [asks[index] for index in chosen]), chosen, strict=True):
            same_output(output, alone[index])
        drained(engine)

    def test_pages_of_the_prefix_cache_hold_the_keys_and_values_of_their_tokens(
        self, llm: LLM, make_engine: MakeEngine
    ) -> None:
        """Ten rounds of one shared prefix and unique tags, a quarter cancelled in the middle of their prefill."""
        rng = Random(3)
        engine = make_engine(llm)
        prefix = prompt_of(16)
        for round_ in range(10):
            asks = [Ask((*prefix, *prompt_of(40, seed=100 * round_ + tag)), GREEDY) for tag in range(8)]
            drive = Drive(engine, asks)
            for index in range(8):
                drive.add(index)
            victims = rng.sample(range(8), 2)
            while engine.has_work:
                drive.step()
                for victim in list(victims):
                    seq = engine._requests[f"r{victim}"].samples[0].seq
                    if 0 < seq.num_dispatched < seq.prompt_len:
                        drive.abort(victim)
                        victims.remove(victim)
            assert not victims
            check_published_pages(engine, make_engine(llm))
            drained(engine)

    def test_a_prefix_is_not_shared_before_its_step_has_committed(self, llm: LLM) -> None:
        engine, prompt = llm.llm_engine, prompt_of(24)
        engine.add_request("first", prompt, GREEDY)
        engine.step()  # dispatched, not read
        assert engine._scheduler.pool.cache.contents() == []
        engine.abort_request("first")
        engine.add_request("second", prompt, GREEDY)
        outputs = [output for _ in range(12) for output in engine.step()]
        assert outputs[-1].finished
        assert outputs[-1].num_cached_tokens == 0

    def test_samples_of_a_request_share_the_pages_of_their_prompt(self, llm: LLM) -> None:
        engine = llm.llm_engine
        engine.add_request("r", prompt_of(40), SamplingParams(n=4, max_tokens=4, seed=1, ignore_eos=True))
        most = 0
        while engine.has_work:
            engine.step()
            most = max(most, engine.scheduler_stats().pages_owned)
        assert most <= 4 + 4 * 2  # 4 in common; the last full one yields the logits, so everyone computes it

    def test_urgent_requests_go_first_under_the_priority_policy(self, llm: LLM, make_engine: MakeEngine) -> None:
        engine = make_engine(llm, policy="priority")
        drive = Drive(engine, [Ask(tuple(prompt_of(60, seed)), LONG, priority=10 - seed) for seed in range(10)])
        for index in range(10):
            drive.add(index)
        drive.drain()
        order = sorted(range(10), key=lambda index: drive.done[index].metrics.first_scheduled_time)
        assert order[0] == 9
        assert set(order[-2:]) == {0, 1}


def check_published_pages(engine: Engine, other: Engine) -> None:
    """Computes the tokens of each chain of cached pages anew, by the engine `other`, and compares K and V."""
    contents, had = published(engine), kv_of(engine._runner)
    leaves = [key for key in contents if not any(len(key) < len(long) and long[: len(key)] == key for long in contents)]
    for leaf in leaves:
        other.reset_prefix_cache()
        # One token more, as the last token of a prompt is never looked up.
        other.add_request("check", [*leaf, 5], SamplingParams(temperature=0, max_tokens=1))
        while other.has_work:
            other.step()
        new = kv_of(other._runner)
        for tokens, page in published(other).items():
            for before, after in zip(had, new, strict=True):
                np.testing.assert_allclose(before[:, contents[tokens]], after[:, page], atol=2e-5)
    set_kv(engine._runner, had)  # both engines have the same device
