"""The list of programs follows from the settings, and every plan that the scheduler may make fits one of them."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from atoma_jax import SamplingParams
from atoma_jax.config import CompileConfig
from atoma_jax.engine.buckets import Buckets, Program, make_buckets
from atoma_jax.engine.plan import StepPlan, Work
from atoma_jax.engine.sequence import Sequence
from atoma_jax.errors import ConfigError


def buckets(growth: int = 2, seqs: int = 8, tokens: int = 64, **settings) -> Buckets:
    return make_buckets(CompileConfig(**settings), max_num_seqs=seqs, max_num_batched_tokens=tokens, growth=growth)


def work(count: int, scores: bool = False) -> Work:
    seq = Sequence(request_id="r", index=0, tokens=[1] * 100, params=SamplingParams())
    return Work(seq, 0, count, False, scores, False, False, 0)


def plan(decodes: int, *chunks: int) -> StepPlan:
    return StepPlan((work(1),) * decodes, tuple(work(count) for count in chunks))


def test_rows_grow_by_a_factor_up_to_the_limit() -> None:
    assert [program.rows for program in buckets(growth=2, seqs=8).decode] == [1, 2, 4, 8]
    assert [program.rows for program in buckets(growth=4, seqs=16).decode] == [1, 4, 16]
    assert [program.rows for program in buckets(growth=4, seqs=20, tokens=64).decode] == [1, 4, 16, 20]
    assert [program.rows for program in buckets(growth=2, seqs=1).decode] == [1]


def test_prefill_has_two_sizes_none_below_the_rows() -> None:
    assert [program.tokens for program in buckets(seqs=8, tokens=512).mixed] == [128, 512]
    assert [program.tokens for program in buckets(seqs=8, tokens=64).mixed] == [16, 64]
    assert [program.tokens for program in buckets(seqs=8, tokens=8).mixed] == [8]


def test_sizes_that_are_given_are_taken() -> None:
    made = buckets(decode_rows=(3, 8), prefill_tokens=(10, 64), score_tokens=48)
    assert [str(program) for program in made.programs] == [
        "mixed-10x8",
        "mixed-64x8",
        "decode-3x3",
        "decode-8x8",
        "score-48x8",
    ]
    assert made.score.logit_rows == 48
    assert made.mixed[0].logit_rows == 8


def test_a_score_takes_no_more_than_a_step() -> None:
    assert buckets(tokens=64, score_tokens=128).score.tokens == 64


def test_deterministic_has_one_size_of_each() -> None:
    made = buckets(deterministic=True)
    assert made.decode == (Program("decode", 8, 8),)
    assert made.mixed == (Program("mixed", 64, 8),)
    assert buckets(deterministic=True, decode_rows=(8,), prefill_tokens=(64,)) == made


@pytest.mark.parametrize(
    ("settings", "field", "limit"),
    [
        ({"decode_rows": (1, 4)}, "decode_rows", "max_num_seqs = 8"),
        ({"decode_rows": (1, 16)}, "decode_rows", "max_num_seqs = 8"),
        ({"prefill_tokens": (16, 32)}, "prefill_tokens", "max_num_batched_tokens = 64"),
        ({"prefill_tokens": (4, 64)}, "prefill_tokens", "the 8 rows of max_num_seqs"),
        ({"deterministic": True, "decode_rows": (4,)}, "decode_rows", "max_num_seqs = 8"),
    ],
)
def test_sizes_that_miss_the_limits_are_refused(settings: dict, field: str, limit: str) -> None:
    with pytest.raises(ConfigError, match=limit) as caught:
        buckets(**settings)
    assert caught.value.field == field
    assert caught.value.value == settings[field]


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (plan(1), "decode-1x1"),
        (plan(2), "decode-8x8"),
        (plan(8), "decode-8x8"),
        (plan(0, 10), "mixed-10x8"),
        (plan(1, 10), "mixed-64x8"),
        (plan(7, 57), "mixed-64x8"),
        (StepPlan((), (work(5, scores=True),)), "score-32x8"),
    ],
)
def test_the_smallest_program_that_holds_a_plan_runs_it(made: StepPlan, name: str) -> None:
    choice = buckets(decode_rows=(1, 8), prefill_tokens=(10, 64), score_tokens=32).choose(made)
    assert str(choice) == name


@given(st.data(), st.integers(1, 64), st.integers(1, 512), st.integers(2, 4))
def test_every_plan_within_the_limits_fits(data: st.DataObject, seqs: int, tokens: int, growth: int) -> None:
    tokens = max(seqs, tokens)
    made = buckets(growth=growth, seqs=seqs, tokens=tokens)
    assert made.decode[-1].rows == seqs
    assert made.mixed[-1].tokens == tokens
    assert len(set(made.programs)) == len(made.programs)
    decodes = data.draw(st.integers(0, seqs))
    if decodes < seqs and decodes < tokens and data.draw(st.booleans()):
        chunk = data.draw(st.integers(1, tokens - decodes))
        choice = made.choose(plan(decodes, chunk))
        assert choice.kind == "mixed"
        assert choice.rows >= decodes + 1
        assert choice.tokens >= decodes + chunk
    elif decodes:
        choice = made.choose(plan(decodes))
        assert choice.kind == "decode"
        assert choice.rows >= decodes
