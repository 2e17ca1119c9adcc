"""Structured outputs: an answer that ends matches what was asked for, and nothing else about it or its neighbours
changes."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atoma_jax import LLM, SamplingParams, StructuredOutputsParams
from atoma_jax.engine import grammars
from atoma_jax.engine.engine import Engine
from atoma_jax.engine.grammars import Grammars
from atoma_jax.errors import ParameterError
from tests.engine.inside import drained, preempt_one
from tests.engine.traffic import Ask, Drive, bound_asks, random_asks, run_all, run_alone, same_output

pytest.importorskip("llguidance", reason="needs the extra `server`: llguidance")

MakeEngine = Callable[..., Engine]
PRINTABLE = [*range(3 + ord("!"), 3 + ord("~") + 1)]  # tokens of one byte
ANY_TEXT = r"[!-~]*"


def guided(params: SamplingParams | None = None, **constraint: Any) -> SamplingParams:
    return replace(
        params or SamplingParams(temperature=0, max_tokens=40),
        structured_outputs=StructuredOutputsParams(**constraint),
    )


def texts(llm: LLM, params: SamplingParams, prompt: tuple[int, ...] = (5, 9, 77)) -> list[Any]:
    (output,) = llm.generate([list(prompt)], params, use_tqdm=False)
    return output.outputs


# Schemas whose values are short, and what their values must be.
_LEAVES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.integers(-20, 0).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 30}),
    st.lists(st.sampled_from(["x", 'é"', "😀", "\n"]), min_size=1, max_size=3, unique=True).map(lambda e: {"enum": e}),
    st.integers(0, 3).map(lambda most: {"type": "string", "maxLength": most, "pattern": "^[a-c]*$"}),
)


def _grown(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = inner.map(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2})
    objects = st.dictionaries(st.sampled_from(["a", "b", "ключ"]), inner, min_size=1, max_size=2).map(
        lambda of: {"type": "object", "properties": of, "required": list(of), "additionalProperties": False}
    )
    return arrays | objects


SCHEMAS = st.recursive(_LEAVES, _grown, max_leaves=3)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """An independent reading of the schemas above."""
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "array":
        return isinstance(value, list) and 1 <= len(value) <= 2 and all(fits(item, schema["items"]) for item in value)
    if kind == "object":
        of = schema["properties"]
        return isinstance(value, dict) and value.keys() == of.keys() and all(fits(value[k], of[k]) for k in of)
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return isinstance(value, str) and bool(re.fullmatch("[a-c]*", value)) and len(value) <= schema["maxLength"]
    return (value is None) if kind == "null" else isinstance(value, bool)


class TestAnAnswerThatEndsMatches:
    @settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(schema=SCHEMAS, seed=st.integers(0, 99))
    def test_schemas(self, llm: LLM, schema: dict[str, Any], seed: int) -> None:
        params = SamplingParams(n=2, temperature=1.0, seed=seed, max_tokens=60)
        for sample in texts(llm, guided(params, json=schema, disable_any_whitespace=True)):
            assert sample.finish_reason in ("stop", "length")
            if sample.finish_reason == "stop":
                assert fits(json.loads(sample.text), schema)
                assert sample.token_ids[-1] in llm.get_tokenizer().eos_token_ids
            else:
                assert len(sample.token_ids) == 60
                assert sample.text

    @settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        regex=st.recursive(
            st.sampled_from(["a", "[b-d]", "é", r"\d", "😀", r"\."]),
            lambda inner: st.one_of(
                st.tuples(inner, inner).map("".join),
                st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
                inner.map(lambda one: f"({one}){{1,3}}"),
            ),
            max_leaves=5,
        ),
        temperature=st.sampled_from([0.0, 1.0]),
    )
    def test_regexes(self, llm: LLM, regex: str, temperature: float) -> None:
        params = SamplingParams(temperature=temperature, seed=3, max_tokens=40)
        (sample,) = texts(llm, guided(params, regex=regex))
        assert sample.finish_reason == "length" or re.fullmatch(regex, sample.text)

    def test_choices_and_grammars(self, llm: LLM) -> None:
        choices = ["yes", "no", 'é😀\n"quoted\\"', "yes, but"]
        found = {
            sample.text for sample in texts(llm, guided(SamplingParams(n=16, seed=1, max_tokens=40), choice=choices))
        }
        assert found <= set(choices)
        assert len(found) > 1
        (sample,) = texts(llm, guided(grammar='start: "(" start ")" | "x"'))
        assert sample.finish_reason == "length" or re.fullmatch(r"\(*x\)*", sample.text)

    def test_any_object(self, llm: LLM) -> None:
        params = SamplingParams(n=8, temperature=1.0, seed=1, max_tokens=80, allowed_token_ids=[*PRINTABLE, 2, 0])
        samples = texts(llm, guided(params, json_object=True, disable_any_whitespace=True))
        ended = [json.loads(sample.text) for sample in samples if sample.finish_reason == "stop"]
        assert ended
        assert all(isinstance(value, dict) for value in ended)


class TestNothingElseChanges:
    @pytest.mark.parametrize(
        "more",
        [
            {"temperature": 0.0},
            {"temperature": 1.0, "seed": 5, "top_p": 0.9},
            {"temperature": 0.8, "seed": 6, "n": 3, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
            {"temperature": 0.8, "seed": 7, "stop": ["e", "t"], "logit_bias": {40: 3.0}, "bad_words": ["a", "+"]},
        ],
        ids=str,
    )
    def test_an_answer_that_matches_anyway_is_the_same(self, deterministic_llm: LLM, more: dict[str, Any]) -> None:
        """To the last bit of its log-probabilities, which are the model's and not those of what is left."""
        params = SamplingParams(max_tokens=24, logprobs=3, allowed_token_ids=[*PRINTABLE, 0, 2], **more)
        plain, bound = (texts(deterministic_llm, asked) for asked in (params, guided(params, regex=ANY_TEXT)))
        assert plain == bound

    def test_the_first_tokens_alternatives_are_the_models(self, llm: LLM) -> None:
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
        (plain,), (bound,) = texts(llm, params), texts(llm, guided(params, choice=["~"]))
        assert bound.text == "~"
        free, told = plain.logprobs[0], bound.logprobs[0]
        assert all(told[token] == value for token, value in free.items())
        assert told[bound.token_ids[0]].rank > 5

    def test_neighbours_are_not_touched(self, llm: LLM) -> None:
        engine = llm.llm_engine
        asks = [replace(ask, params=replace(ask.params, temperature=0.0)) for ask in random_asks(Random(4), 6)]
        alone = [run_alone(engine, ask) for ask in asks]
        bound = [Ask((5, 9, index), guided(json={"type": "boolean"})) for index in range(6)]
        together = run_all(engine, [ask for pair in zip(asks, bound, strict=True) for ask in pair])
        for one, other in zip(alone, together[::2], strict=True):
            same_output(one, other)
        assert {output.outputs[0].text.strip() for output in together[1::2]} <= {"true", "false"}


class TestTraffic:
    @pytest.mark.parametrize("pipelined", [True, False])
    def test_preempted_among_others_as_alone(self, llm: LLM, make_engine: MakeEngine, pipelined: bool) -> None:
        asks = [*bound_asks(6), *random_asks(Random(3), 3)]
        asks = [replace(ask, params=replace(ask.params, temperature=0.0)) for ask in asks]
        alone = [run_alone(llm.llm_engine, ask) for ask in asks]
        engine, rng = make_engine(llm, pipelined=pipelined), Random(5)
        drive = Drive(engine, asks)
        for index in rng.sample(range(len(asks)), len(asks)):
            drive.add(index)

        def meddle() -> None:
            if rng.random() < 0.15:
                preempt_one(engine, rng)

        drive.drain(meddle)
        drained(engine)
        assert engine.stats().preemptions > 3
        for one, other in zip(alone, drive.outputs, strict=True):
            same_output(one, other)

    def test_sampled_ones_to_the_last_bit(self, deterministic_llm: LLM) -> None:
        engine = deterministic_llm.llm_engine
        asks = [
            replace(ask, params=replace(ask.params, temperature=0.9, seed=index, logprobs=2))
            for index, ask in enumerate(bound_asks(3))
        ]
        alone = [run_alone(engine, ask) for ask in asks]
        assert [output.outputs for output in run_all(engine, asks)] == [output.outputs for output in alone]

    def test_those_who_wait_are_not_kept_from_a_step_by_one_who_does_not(self, llm: LLM) -> None:
        """Three bound rows and a free one: the bound ones are in every step that the free one is in, but for few."""
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        bound = Ask((5, 9), guided(SamplingParams(temperature=0, max_tokens=20), regex="[a-f]{60}"))
        drive = Drive(llm.llm_engine, [bound, bound, bound, Ask((7, 8), params)])
        for index in range(4):
            drive.add(index)
        planned: list[int] = []
        while drive.engine.has_work:
            drive.step()
            if drive.engine._in_flight:
                planned.append(sum(work.seq.guide is not None for work in drive.engine._in_flight[-1].plan.works))
        assert {len(output.outputs[0].token_ids) for output in drive.outputs} == {20}
        assert planned.count(3) >= 18

    def test_a_free_row_is_pipelined_beside_a_bound_one(self, llm: LLM) -> None:
        engine = llm.llm_engine
        free = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        bound = guided(SamplingParams(temperature=0, max_tokens=20), regex="[a-f]{60}")
        asks = [Ask((5, 9), bound), *(Ask((7, index), free) for index in range(3))]
        drive = Drive(engine, asks)
        for index in range(4):
            drive.add(index)
        gaps = 0
        while engine.has_work:
            running = any(seq.guide is None for seq in engine._scheduler.sequences)
            drive.step()
            gaps += running and not engine._in_flight
        assert gaps == 0  # the device has always had a step to go on with
        assert len(drive.outputs[0].outputs[0].token_ids) == 20

    def test_aborted_in_any_state(self, llm: LLM) -> None:
        engine = llm.llm_engine
        for steps in range(6):
            drive = Drive(engine, bound_asks(3))
            for index in range(3):
                drive.add(index)
            for _ in range(steps):
                drive.step()
            for index in range(3):
                drive.abort(index)
            drive.drain()
            drained(engine)

    def test_free_requests_write_no_bits(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []
        runner = llm.llm_engine._runner
        allow = runner.allow
        monkeypatch.setattr(runner, "allow", lambda rows, bits: (calls.append(len(rows)), allow(rows, bits)))
        run_all(llm.llm_engine, random_asks(Random(2), 8))
        assert calls == []
        texts(llm, guided(choice=["ab"]))
        assert calls == [1, 1, 1]  # two tokens and the end


class TestEnds:
    def test_a_stop_token_without_text_may_end_what_is_complete(self, llm: LLM) -> None:
        start = llm.get_tokenizer().token_to_id("<|im_start|>")
        assert start is not None
        params = SamplingParams(temperature=0, max_tokens=9, stop_token_ids=[start], logit_bias={start: 100.0})
        (sample,) = texts(llm, guided(params, regex="[ab]{3}"))
        assert (len(sample.text), sample.token_ids[3:], sample.stop_reason) == (3, [start], start)

    def test_min_tokens_ends_where_nothing_can_follow(self, llm: LLM) -> None:
        params = SamplingParams(temperature=0, max_tokens=9, min_tokens=5)
        (sample,) = texts(llm, guided(params, choice=["ab"]))
        assert (sample.text, sample.finish_reason, len(sample.token_ids)) == ("ab", "stop", 2)
        (sample,) = texts(llm, guided(params, regex="a*"))
        assert len(sample.token_ids) >= 5

    def test_stop_strings_end_it_before_it_is_complete(self, llm: LLM) -> None:
        params = SamplingParams(temperature=0, max_tokens=9, stop=["b"])
        (sample,) = texts(llm, guided(params, choice=["abc"]))
        assert (sample.text, sample.finish_reason, sample.stop_reason) == ("a", "stop", "b")

    def test_where_rules_leave_no_token(self, llm: LLM) -> None:
        params = SamplingParams(temperature=0, max_tokens=9, allowed_token_ids=[5])
        (sample,) = texts(llm, guided(params, choice=["z"]))
        assert sample.finish_reason == "error"
        assert "allowed_token_ids" in str(sample.stop_reason)

    def test_what_takes_too_much_ends_with_its_reason(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(grammars, "_STEP_LIMITS", {"step_lexer_fuel": 100, "verbose_errors": False})
        params = SamplingParams(n=4, seed=1, max_tokens=60, allowed_token_ids=[3 + ord("a"), 3 + ord("b")])
        samples = texts(llm, guided(params, regex="(a|b)*a(a|b){40}c"))
        assert {sample.finish_reason for sample in samples} == {"error"}
        assert {str(sample.stop_reason)[:24] for sample in samples} == {"the answer cannot go on:"}


class TestRefused:
    @pytest.mark.parametrize(
        ("constraint", "field", "problem"),
        [
            ({"regex": "(a"}, "structured_outputs.regex", "unclosed group"),
            ({"regex": r"(a)\1"}, "structured_outputs.regex", "backreferences are not supported"),
            ({"regex": "(?=a)b"}, "structured_outputs.regex", "look-around"),
            ({"regex": r"[^\s\S]"}, "structured_outputs.regex", "no text fits it"),
            ({"json": {"type": "array", "uniqueItems": True}}, "structured_outputs.json", "uniqueItems"),
            ({"json": {"$ref": "http://example.com/x"}}, "structured_outputs.json", "example.com"),
            ({"json": {"$ref": "#"}}, "structured_outputs.json", "no text fits it"),
            ({"json": {"type": 7}}, "structured_outputs.json", "type"),
            ({"json": "[1]"}, "structured_outputs.json", "schema"),
            ({"grammar": "start: missing"}, "structured_outputs.grammar", "missing"),
            ({"grammar": 'start: start "a"'}, "structured_outputs.grammar", "no text fits it"),
        ],
        ids=str,
    )
    def test_by_name_before_anything_is_kept(
        self, llm: LLM, constraint: dict[str, Any], field: str, problem: str
    ) -> None:
        with pytest.raises(ParameterError, match=problem) as refused:
            texts(llm, guided(**constraint))
        assert refused.value.field == field
        assert len(str(refused.value)) < 500
        assert not llm.llm_engine.has_work

    def test_a_million_values(self, llm: LLM) -> None:
        with pytest.raises(ParameterError, match="at most 131072 characters"):
            guided(json={"enum": [str(i) for i in range(10**6)]})

    def test_deep_nesting(self, llm: LLM) -> None:
        deep = '{"properties":{"a":' * 5000 + "{}" + "}}" * 5000
        with pytest.raises(ParameterError, match=r"recursion limit|nested too deep"):
            texts(llm, guided(json=deep))

    def test_without_llguidance(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("atoma_jax.engine.grammars.has_llguidance", lambda: False)
        own = Grammars(llm.get_tokenizer(), vocab_size=269)
        with pytest.raises(ParameterError, match=r"pip install 'atoma-jax\[server\]'"):
            own.compile(StructuredOutputsParams(regex="a"))

    def test_the_cache_is_bounded(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("atoma_jax.engine.grammars.MAX_CACHED", 3)
        own = Grammars(llm.get_tokenizer(), vocab_size=269)
        first = own.compile(StructuredOutputsParams(regex="a0"))
        assert own.compile(StructuredOutputsParams(regex="a0")) is first
        for index in range(1, 6):
            own.compile(StructuredOutputsParams(regex=f"a{index}"))
        assert len(own._compiled) == 3
        assert own.compile(StructuredOutputsParams(regex="a0")) is not first


def test_padding_of_the_vocabulary_is_never_allowed(llm: LLM) -> None:
    own = Grammars(llm.get_tokenizer(), vocab_size=300)
    guide = own.guide(guided(regex=r"(.|\n)*"))
    allowed = np.flatnonzero(np.unpackbits(own.bits([guide]).view(np.uint8), bitorder="little"))
    assert allowed.max() < llm.get_tokenizer().vocab_size
    assert {0, 2} <= set(allowed.tolist())  # both ends
