"""A packed plan says of every token, row and yielded logit what the plan says, and nothing of what is padding."""

from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from atoma_jax import SamplingParams
from atoma_jax.engine.batch import BatchFields, SlotTables, batch_size, field_shapes, pack, unpack
from atoma_jax.engine.buckets import Program
from atoma_jax.engine.plan import StepPlan, Work
from atoma_jax.engine.sampling_rows import Column, RowFlag, encode
from atoma_jax.engine.sequence import Sequence

WIDTH, PAGE, SLOTS = 6, 4, 5


@dataclass(frozen=True)
class Row:
    """What a test wants of one sequence."""

    prompt: int
    outputs: int
    logprobs: int | None = None


def sequence(name: int, row: Row, slot: int, prompt_logprobs: int | None = None) -> Sequence:
    params = SamplingParams(
        temperature=0.5, logprobs=row.logprobs, prompt_logprobs=prompt_logprobs, max_tokens=99, presence_penalty=0.25
    )
    seq = Sequence(
        request_id=str(name), index=0, tokens=[100 * name + i for i in range(row.prompt)], params=params, slot=slot
    )
    seq.tokens += [100 * name + 50 + i for i in range(row.outputs)]
    seq.pages = [10 * name + i + 1 for i in range(-(-len(seq.tokens) // PAGE))]
    return seq


def tables_of(seqs: list[Sequence]) -> SlotTables:
    tables = SlotTables.empty(SLOTS, WIDTH)
    for seq in seqs:
        tables.take(seq.slot, encode(seq.params, slot=seq.slot, seed=7))
    return tables


def decode(seq: Sequence, on_device: bool) -> Work:
    """The next token: it is known, or was sampled by the step before."""
    start = len(seq.tokens) - (not on_device)
    if start // PAGE == len(seq.pages):
        seq.pages.append(10 * int(seq.request_id) + len(seq.pages) + 1)
    return Work(seq, start, 1, True, False, on_device, False, 0)


def prefill(seq: Sequence, start: int, count: int) -> Work:
    return Work(seq, start, count, start + count == len(seq.tokens), False, False, start == 0, 0)


@dataclass(frozen=True)
class Wish:
    """A step as numbers: strategies draw it, tests build it."""

    decodes: list[tuple[Row, bool]]  # the token is on the device
    prefills: list[tuple[Row, int, int]]  # start, count
    slots: list[int]
    spare: int

    def build(self) -> tuple[StepPlan, SlotTables, Program]:
        rows = [row for row, *_ in (*self.decodes, *self.prefills)]
        seqs = [sequence(name, row, self.slots[name]) for name, row in enumerate(rows)]
        n = len(self.decodes)
        decodes = [decode(seq, on_device) for seq, (_, on_device) in zip(seqs, self.decodes, strict=False)]
        prefills = [prefill(seq, *span) for seq, (_, *span) in zip(seqs[n:], self.prefills, strict=True)]
        plan = StepPlan(tuple(decodes), tuple(prefills))
        if prefills:
            return plan, tables_of(seqs), Program("mixed", max(SLOTS, plan.num_tokens + self.spare), SLOTS)
        size = min(SLOTS, max(1, n + self.spare))
        return plan, tables_of(seqs), Program("decode", size, size)


@st.composite
def wishes(draw: st.DrawFn) -> Wish:
    logprobs = st.none() | st.integers(0, 3)
    decoding = st.builds(Row, st.integers(1, 10), st.integers(1, 10), logprobs)
    filling = st.builds(Row, st.integers(1, 12), st.integers(0, 8), logprobs)
    prefills = []
    for row in draw(st.lists(filling, max_size=2)):
        start = draw(st.integers(0, row.prompt + row.outputs - 1))
        prefills.append((row, start, draw(st.integers(1, row.prompt + row.outputs - start))))
    return Wish(
        draw(st.lists(st.tuples(decoding, st.booleans()), max_size=3)),
        prefills,
        draw(st.permutations(range(SLOTS))),
        draw(st.integers(0, 4)),
    )


@given(wishes())
def test_every_token_has_its_place(wish: Wish) -> None:
    plan, tables, program = wish.build()
    batch = unpack(pack(plan, program, tables), program, WIDTH)
    assert batch.num_tokens.tolist() == [plan.num_tokens]
    at = 0
    for row, work in enumerate(plan.works):
        table = batch.page_table[row]
        assert table[: len(work.seq.pages)].tolist() == work.seq.pages
        for position in range(work.start, work.end):
            assert batch.row[at] == row
            assert batch.position[at] == position
            assert table[position // PAGE] != 0, "a token without a page"
            if work.token_on_device:
                assert batch.from_slot[row] == 1 + work.seq.slot
            else:
                assert batch.from_slot[row] == 0
                assert batch.tokens[at] == work.seq.tokens[position]
            at += 1
        if work in plan.decodes:
            assert batch.decode_length[row] == work.end
            assert batch.chunk_count[row] == 0
        else:
            assert batch.decode_length[row] == 0
            assert batch.chunk_start[row] == at - work.count
            assert batch.chunk_count[row] == work.count
            assert batch.chunk_position[row] == work.start
        assert batch.logit_token[row] == (at - 1 if work.samples else -1)


@given(wishes())
def test_padding_asks_for_nothing(wish: Wish) -> None:
    plan, tables, program = wish.build()
    batch = unpack(pack(plan, program, tables), program, WIDTH)
    used, tokens = len(plan.works), plan.num_tokens
    assert not batch.tokens[tokens:].any()
    assert not batch.from_slot[used:].any()
    assert not batch.decode_length[used:].any()
    assert (batch.logit_token[used:] == -1).all()
    assert not batch.chunk_count[used:].any()
    assert not batch.page_table[used:].any()
    assert not batch.sampling[used:, Column.FLAGS].any()
    starts = batch.chunk_start[len(plan.decodes) :]
    assert (np.diff(starts) >= 0).all(), "the work list of attention searches them"


@given(wishes())
def test_rows_that_yield_a_token_bring_their_settings(wish: Wish) -> None:
    plan, tables, program = wish.build()
    batch = unpack(pack(plan, program, tables), program, WIDTH)
    for row, work in enumerate(plan.works):
        settings = batch.sampling[row]
        if not work.samples:
            assert settings[Column.FLAGS] == 0
            continue
        wanted = encode(work.seq.params, slot=work.seq.slot, seed=7)
        wanted[Column.POSITION] = work.end
        wanted[Column.NUM_OUTPUTS] = work.end - work.seq.prompt_len
        np.testing.assert_array_equal(settings, wanted)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=4), st.data())
def test_a_score_asks_for_every_following_token(lengths: list[int], data: st.DataObject) -> None:
    works: list[Work] = []
    for index, length in enumerate(lengths):
        seq = sequence(index, Row(length, 0), slot=3 - index, prompt_logprobs=index)
        start = data.draw(st.integers(0, length - 2))
        count = data.draw(st.integers(1, length - 1 - start))
        works.append(Work(seq, start, count, False, True, False, True, 0))
    program = Program("score", 36, 4)
    batch = unpack(pack(StepPlan((), tuple(works)), program, tables_of([w.seq for w in works])), program, WIDTH)
    total = sum(work.count for work in works)
    rows = batch.sampling[:total]
    assert batch.tokens[:total].tolist() == [t for w in works for t in w.seq.tokens[w.start : w.end]]
    assert rows[:, Column.TARGET].tolist() == [t for w in works for t in w.seq.tokens[w.start + 1 : w.end + 1]]
    wanted = [w.seq.params.prompt_logprobs for w in works for _ in range(w.count)]
    assert rows[:, Column.NUM_LOGPROBS].tolist() == wanted
    assert set(rows[:, Column.FLAGS].tolist()) == {int(RowFlag.SCORE | RowFlag.LOGPROBS)}
    assert batch.logit_token[:total].tolist() == list(range(total))
    assert (batch.logit_token[total:] == -1).all()
    assert not batch.sampling[total:].any()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_the_kept_page_table_follows_a_sequence_as_it_grows(growth: list[int]) -> None:
    tables = SlotTables.empty(2, 40)
    settings = encode(SamplingParams(), slot=1, seed=0)
    tables.take(1, settings)
    pages: list[int] = []
    for count in growth:
        pages += range(len(pages) + 1, len(pages) + 1 + count)
        tables.update(1, pages)
        assert tables.pages[1, : len(pages)].tolist() == pages
    tables.take(1, settings)  # another sequence: its pages replace the old ones
    tables.update(1, [77])
    assert tables.pages[1, 0] == 77
    assert not tables.pages[0].any()


def test_the_parts_fill_the_array_without_gaps() -> None:
    program = Program("mixed", 8, 3)
    words = np.arange(batch_size(program, WIDTH), dtype=np.int32)
    batch = unpack(words, program, WIDTH)
    np.testing.assert_array_equal(np.concatenate([part.ravel() for part in batch]), words)
    assert [part.shape for part in batch] == field_shapes(program, WIDTH)
    assert len(BatchFields._fields) == len(field_shapes(program, WIDTH))
