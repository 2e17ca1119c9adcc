"""What goes wrong stays with the request it belongs to: bad input, aborts, NaN; and a lost device loses all of them."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest

from atoma_jax import LLM, EngineDeadError, Overloaded, RequestOutput, SamplingParams, UserError
from atoma_jax.engine.engine import Engine
from atoma_jax.engine.text_stream import TextStream
from tests.engine.inside import BorrowedRunner, FailingRunner, drained, kv_of, poison, preempt_one, published
from tests.engine.traffic import VOCAB, Ask, Drive, logprob_bits, run_all, same_output

MakeEngine = Callable[..., Engine]

PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=2)
MAX_LEN = 96


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(Random(seed).choices(range(3, 259), k=length))


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def unchecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """As users call it: nothing but our tests checks annotations at run time."""
    return inspect.unwrap(function)


class TestBadInput:
    @pytest.mark.parametrize(
        ("prompt", "field", "part"),
        [
            ("", "prompt", "cannot be empty"),
            ([], "prompt", "cannot be empty"),
            ({"prompt_token_ids": []}, "prompt", "cannot be empty"),
            ("x" * MAX_LEN, "prompt", f"maximum context length is {MAX_LEN} tokens"),
            ([5] * MAX_LEN, "prompt", "leaves no room for an output token"),
            ([5] * 10_000, "prompt", "10000 input tokens, which exceeds this limit"),
            ([5, -1], "prompt_token_ids", f"-1 is out of vocabulary [0, {VOCAB})"),
            ([VOCAB], "prompt_token_ids", f"{VOCAB} is out of vocabulary"),
            ([10**24], "prompt_token_ids", "out of vocabulary"),
            ([10**5000], "prompt_token_ids", "out of vocabulary"),
            ([True], "prompt_token_ids", "must be an integer"),
            (["7"], "prompt_token_ids", "must be an integer"),
            ([1.5], "prompt_token_ids", "must be an integer"),
            ([None], "prompt_token_ids", "must be an integer"),
            ({"prompt_token_ids": "abc"}, "prompt_token_ids", "must be an integer"),
            (None, "prompt", "not NoneType"),
            (5, "prompt", "not int"),
            (b"bytes", "prompt", "not bytes"),
            ({"prompt_token_ids": 5}, "prompt", "not int"),
            ({}, "prompt", "keys"),
            ({"text": "x"}, "prompt", "keys"),
            ("\ud800", "prompt", "lone surrogate, U+D800 at character 0"),
        ],
    )
    def test_a_bad_prompt_is_refused_before_anything_is_kept(
        self, llm: LLM, prompt: Any, field: str, part: str
    ) -> None:
        with pytest.raises(UserError, match=r"(?s).+") as caught:
            unchecked(Engine.add_request)(llm.llm_engine, "r", prompt, PARAMS)
        assert caught.value.field == field
        assert part in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert not llm.llm_engine.has_work

    def test_whitespace_is_a_prompt(self, llm: LLM) -> None:
        (output,) = llm.generate(" \n\t ", PARAMS, use_tqdm=False)
        assert len(output.prompt_token_ids) == 4
        assert len(output.outputs[0].token_ids) == 20

    def test_integers_of_an_array_are_token_ids(self, llm: LLM) -> None:
        (listed,) = llm.generate([[5, 6, 7]], PARAMS, use_tqdm=False)
        unchecked(Engine.add_request)(llm.llm_engine, "r", np.array([5, 6, 7]), PARAMS)
        while llm.llm_engine.has_work:
            outputs = llm.llm_engine.step()
        same_output(listed, outputs[0])
        assert outputs[0].prompt_token_ids == [5, 6, 7]
        assert type(outputs[0].prompt_token_ids[0]) is int

    @pytest.mark.parametrize(
        ("settings", "field"),
        [
            ({"logprobs": 21}, "logprobs"),
            ({"prompt_logprobs": -1}, "prompt_logprobs"),
            ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
            ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
            ({"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
            ({"bad_words": ["a" * 20]}, "bad_words"),
        ],
    )
    def test_parameters_beyond_the_model_are_refused(self, llm: LLM, settings: dict[str, Any], field: str) -> None:
        with pytest.raises(UserError) as caught:
            llm.llm_engine.add_request("r", "x", SamplingParams(**settings))
        assert caught.value.field == field
        assert not llm.llm_engine.has_work

    @pytest.mark.parametrize(
        "order", [{"priority": "high"}, {"priority": None}, {"priority": True}, {"priority": 1.5}, {"cache_salt": 7}]
    )
    def test_what_the_scheduler_sorts_by_is_of_one_kind(self, llm: LLM, order: dict[str, Any]) -> None:
        with pytest.raises(UserError) as caught:
            unchecked(Engine.add_request)(llm.llm_engine, "r", "x", PARAMS, **order)
        assert caught.value.field in order
        assert not llm.llm_engine.has_work

    def test_an_id_in_use_is_refused_and_the_first_one_goes_on(self, llm: LLM) -> None:
        engine = llm.llm_engine
        drive = Drive(engine, [Ask(prompt_of(9), PARAMS)])
        drive.add(0)
        with pytest.raises(UserError, match="'r0' is in use"):
            drive.add(0)
        drive.drain()
        assert drive.done[0].outputs[0].finish_reason == "length"
        drive.add(0)  # free again
        drive.drain()

    def test_a_full_queue_refuses_and_keeps_its_order(self, llm: LLM, make_engine: MakeEngine) -> None:
        engine = make_engine(llm, max_waiting=2)
        drive = Drive(engine, [Ask(prompt_of(9, seed), PARAMS) for seed in range(3)])
        drive.add(0)
        drive.add(1)
        with pytest.raises(Overloaded) as caught:
            drive.add(2)
        assert caught.value.retry_after > 0
        drive.drain()
        assert sorted(drive.done) == [0, 1]
        drained(engine)


class TestMaximumLength:
    @pytest.mark.parametrize("length", [1, 8, 63, 64, 88, 94, 95])
    def test_a_sequence_ends_exactly_there(self, llm: LLM, length: int) -> None:
        endless = replace(PARAMS, max_tokens=None)
        (whole,) = llm.generate([list(prompt_of(length))], endless, use_tqdm=False)
        (sample,) = whole.outputs
        assert sample.finish_reason == "length"
        assert length + len(sample.token_ids) == MAX_LEN
        # Nothing behind the end has overwritten what came before: the same prompt, from the cache, again.
        (again,) = llm.generate([list(prompt_of(length))], endless, use_tqdm=False)
        assert again.num_cached_tokens == (length - 1) // 8 * 8
        same_output(whole, again)

    def test_a_neighbour_at_its_end_changes_no_other(self, llm: LLM, make_engine: MakeEngine) -> None:
        asks = [Ask(prompt_of(70 + 5 * seed, seed), replace(PARAMS, max_tokens=None)) for seed in range(4)]
        alone = [run_all(make_engine(llm), [ask])[0] for ask in asks]
        for output, reference in zip(run_all(make_engine(llm), asks), alone, strict=True):
            same_output(output, reference)

    def test_a_cache_smaller_than_the_model_ends_a_sequence_too(self, llm: LLM, make_engine: MakeEngine) -> None:
        engine = make_engine(llm, num_pages=8)
        (output,) = run_all(engine, [Ask(prompt_of(20), replace(PARAMS, max_tokens=None))])
        assert output.outputs[0].finish_reason == "length"
        assert 20 + len(output.outputs[0].token_ids) == 7 * 8 + 1  # the last token needs no place
        with pytest.raises(UserError, match="The KV cache holds 56 tokens"):
            engine.add_request("r", prompt_of(56), PARAMS)
        drained(engine)


class TestAbort:
    """Pages are back at the base line within two steps, whatever state the request is in."""

    def abort_and_check(self, engine: Engine, request_id: str, base: int) -> RequestOutput:
        output = engine.abort_request(request_id)
        assert output is not None
        assert output.finished
        assert {sample.finish_reason for sample in output.outputs} == {"abort"}
        engine.step()
        engine.step()
        assert engine.scheduler_stats().pages_owned == base
        engine.check_integrity()
        assert engine.abort_request(request_id) is None
        return output

    def test_while_queued(self, llm: LLM, make_engine: MakeEngine) -> None:
        engine = make_engine(llm)
        engine.add_request("r", prompt_of(60), PARAMS)
        output = self.abort_and_check(engine, "r", 0)
        assert output.outputs[0].token_ids == []
        drained(engine)

    def test_in_prefill(self, llm: LLM, make_engine: MakeEngine) -> None:
        engine = make_engine(llm)
        engine.add_request("r", prompt_of(60), PARAMS)
        engine.step()
        assert engine.scheduler_stats().pages_owned == 4
        self.abort_and_check(engine, "r", 0)
        assert published(engine) == {}
        drained(engine)

    @pytest.mark.parametrize("pipelined", [True, False])
    def test_in_decode(self, llm: LLM, make_engine: MakeEngine, pipelined: bool) -> None:
        engine = make_engine(llm, pipelined=pipelined)
        engine.add_request("other", prompt_of(20, 1), replace(PARAMS, max_tokens=60))
        engine.add_request("r", prompt_of(30), replace(PARAMS, n=2, max_tokens=60))
        for _ in range(12):
            engine.step()
        output = self.abort_and_check(engine, "r", -(-(20 + 14) // 8))
        assert all(5 < len(sample.token_ids) < 14 for sample in output.outputs)
        assert all(len(sample.logprobs) == len(sample.token_ids) for sample in output.outputs)
        engine.abort_request("other")
        engine.step()
        drained(engine)

    def test_while_scoring(self, llm: LLM, make_engine: MakeEngine) -> None:
        engine = make_engine(llm)
        engine.add_request("r", prompt_of(60), replace(PARAMS, prompt_logprobs=1))
        engine.step()
        engine.step()
        self.abort_and_check(engine, "r", 0)
        drained(engine)

    def test_preempted(self, llm: LLM, make_engine: MakeEngine) -> None:
        engine = make_engine(llm)
        engine.add_request("r", prompt_of(30), PARAMS)
        for _ in range(6):
            engine.step()
        preempt_one(engine, Random(0))
        assert engine.scheduler_stats().num_waiting == 1
        output = self.abort_and_check(engine, "r", 0)
        assert output.metrics.num_preemptions == 1
        assert len(output.outputs[0].token_ids) >= 3
        drained(engine)

    def test_an_id_is_free_at_once(self, llm: LLM) -> None:
        drive = Drive(llm.llm_engine, [Ask(prompt_of(30), PARAMS)])
        drive.add(0)
        drive.step()
        drive.step()
        drive.abort(0)
        drive.add(0)
        drive.drain()
        assert len(drive.done[0].outputs[0].token_ids) == 20


class TestNaN:
    """A page of NaN stands for any NaN in one row: from there it is in everything that the row yields."""

    ASKS = tuple(Ask(prompt_of(20 + seed, seed), PARAMS) for seed in range(3))

    def test_in_decode_one_row_ends_and_its_neighbours_are_bit_equal(
        self, deterministic_llm: LLM, make_engine: MakeEngine
    ) -> None:
        reference = run_all(make_engine(deterministic_llm), self.ASKS)
        engine = make_engine(deterministic_llm)
        drive = Drive(engine, self.ASKS)
        for index in range(3):
            drive.add(index)
        for _ in range(8):
            drive.step()
        seq = engine._requests["r1"].samples[0].seq
        poison(engine._runner, seq.pages[-1])  # not full, so not published yet
        drive.drain()
        sick = drive.done[1].outputs[0]
        assert sick.finish_reason == "error"
        assert sick.token_ids == reference[1].outputs[0].token_ids[: len(sick.token_ids)]
        for index in (0, 2):
            same_output(drive.done[index], reference[index])
            assert logprob_bits(drive.done[index]) == logprob_bits(reference[index])
        self.check_no_trace(engine, reference)

    def test_in_prefill_nothing_is_cached(self, deterministic_llm: LLM, make_engine: MakeEngine) -> None:
        engine = make_engine(deterministic_llm)
        drive = Drive(engine, [Ask(prompt_of(80), PARAMS)])
        drive.add(0)
        drive.step()  # the first of three chunks
        poison(engine._runner, engine._requests["r0"].samples[0].seq.pages[0])
        drive.drain()
        assert drive.done[0].outputs[0].finish_reason == "error"
        assert drive.done[0].outputs[0].token_ids == []
        assert published(engine) == {}
        self.check_no_trace(engine, run_all(make_engine(deterministic_llm), self.ASKS))

    def test_in_scoring_no_nan_is_handed_out(self, deterministic_llm: LLM, make_engine: MakeEngine) -> None:
        engine = make_engine(deterministic_llm)
        drive = Drive(engine, [Ask(prompt_of(60), replace(PARAMS, prompt_logprobs=1, n=2))])
        drive.add(0)
        drive.step()
        poison(engine._runner, engine._requests["r0"].samples[0].seq.pages[0])
        drive.drain()
        output = drive.done[0]
        assert output.outputs[0].finish_reason == "error"
        handed_out = [value.logprob for entry in output.prompt_logprobs[1:] for value in entry.values()]
        assert handed_out
        assert np.isfinite(handed_out).all()
        self.check_no_trace(engine, run_all(make_engine(deterministic_llm), self.ASKS))

    def test_one_sample_of_two(self, deterministic_llm: LLM, make_engine: MakeEngine) -> None:
        ask = Ask(prompt_of(20), replace(PARAMS, n=2, temperature=1, seed=3))
        (reference,) = run_all(make_engine(deterministic_llm), [ask])
        engine = make_engine(deterministic_llm)
        drive = Drive(engine, [ask])
        drive.add(0)
        for _ in range(6):
            drive.step()
        poison(engine._runner, engine._requests["r0"].samples[0].seq.pages[2])  # pages 0 and 1 are the common prompt's
        drive.drain()
        first, second = drive.done[0].outputs
        assert first.finish_reason == "error"
        assert second == reference.outputs[1]
        drained(engine)

    def test_scratch_may_hold_anything(self, deterministic_llm: LLM, make_engine: MakeEngine) -> None:
        reference = run_all(make_engine(deterministic_llm), self.ASKS)
        poison(deterministic_llm.llm_engine._runner, 0)
        for output, wanted in zip(run_all(make_engine(deterministic_llm), self.ASKS), reference, strict=True):
            assert logprob_bits(output) == logprob_bits(wanted)

    def check_no_trace(self, engine: Engine, reference: list[RequestOutput]) -> None:
        """No published page holds a NaN, and whoever gets the pages of the sick request next is as well as ever."""
        drained(engine)
        for array in kv_of(engine._runner):
            assert np.isfinite(array[:, list(published(engine).values())]).all()
        engine.reset_prefix_cache()
        for output, wanted in zip(run_all(engine, self.ASKS), reference, strict=True):
            assert logprob_bits(output) == logprob_bits(wanted)


class TestLostDevice:
    @pytest.mark.parametrize("at_read", [False, True], ids=["launch", "read"])
    def test_the_engine_is_dead(self, llm: LLM, make_engine: MakeEngine, at_read: bool) -> None:
        engine = make_engine(llm)
        engine._runner = FailingRunner(engine._runner, launches=4, at_read=at_read)
        self.dies(engine, "RESOURCE_EXHAUSTED" if not at_read else "the device is gone")

    def test_so_it_is_when_the_hosts_books_fail(
        self, llm: LLM, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(self: TextStream, token: int, *, ends: bool) -> str:
            raise KeyError(token)

        monkeypatch.setattr(TextStream, "push", fail)
        self.dies(make_engine(llm), "KeyError")

    def dies(self, engine: Engine, why: str) -> None:
        engine.add_request("r", prompt_of(9), PARAMS)
        with pytest.raises(EngineDeadError, match=why) as caught:
            drain(engine)
        assert caught.value.__cause__ is not None
        assert engine.is_dead
        with pytest.raises(EngineDeadError, match=why):
            engine.add_request("other", prompt_of(9), PARAMS)
        with pytest.raises(EngineDeadError, match=why):
            engine.step()

    def test_a_closed_engine_says_so(self, llm: LLM, make_engine: MakeEngine) -> None:
        engine = make_engine(llm)
        engine._runner = BorrowedRunner(engine._runner)
        engine.add_request("r", prompt_of(9), PARAMS)
        engine.step()
        engine.close()
        drained(engine)
        with pytest.raises(EngineDeadError, match="was shut down"):
            engine.add_request("r", prompt_of(9), PARAMS)
