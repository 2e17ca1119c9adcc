"""Packs a plan into the one int32 array that a step takes, and names its parts for both sides. Host side in numpy.

The array's layout is a function of the program and the sizes alone, so the device unpacks it with static slices.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int32

from atoma_jax.engine.buckets import Program
from atoma_jax.engine.plan import StepPlan, Work
from atoma_jax.engine.sampling_rows import NUM_COLUMNS, Column, encode_score

Words: TypeAlias = Any  # int32: numpy arrays while the host packs, JAX arrays while the device unpacks


class BatchFields(NamedTuple):
    """Parts of a batch: T tokens, B sequences, W pages a table, Q rows of logits, C columns of settings."""

    num_tokens: Words  # [1]
    tokens: Words  # [T]
    row: Words  # [T] sequence of each token
    position: Words  # [T]
    from_slot: Words  # [B] 1 + the slot whose last sampled token is the row's input; 0: it is in tokens
    decode_length: Words  # [B] context of a row that decodes, this step included; 0 for the others
    chunk_start: Words  # [B] first token of a row's chunk of prefill
    chunk_count: Words  # [B] tokens of it; 0 for rows that decode
    chunk_position: Words  # [B] of its first token
    logit_token: Words  # [Q] token whose hidden state yields each row of logits; -1 of rows that nobody reads
    sampling: Words  # [Q, C] see sampling_rows.py
    page_table: Words  # [B, W]


def field_shapes(program: Program, table_width: int) -> list[tuple[int, ...]]:
    """The shape of each part, in the order of `BatchFields`."""
    T, B, Q = program.tokens, program.rows, program.logit_rows
    return [(1,), (T,), (T,), (T,), (B,), (B,), (B,), (B,), (B,), (Q,), (Q, NUM_COLUMNS), (B, table_width)]


def batch_size(program: Program, table_width: int) -> int:
    """int32 words of a batch."""
    return sum(math.prod(shape) for shape in field_shapes(program, table_width))


def unpack(words: Words, program: Program, table_width: int) -> BatchFields:
    """The parts of a batch of `batch_size` words."""
    parts: list[Words] = []
    at = 0
    for shape in field_shapes(program, table_width):
        size = math.prod(shape)
        parts.append(words[at : at + size].reshape(shape))
        at += size
    return BatchFields(*parts)


@dataclass(slots=True)
class SlotTables:
    """The host's persistent copy of what each slot's rows need: page table and sampling settings."""

    pages: Int32[np.ndarray, "S W"]
    filled: list[int]  # pages of each slot that are in `pages`
    settings: Int32[np.ndarray, "S C"]

    @classmethod
    def empty(cls, slots: int, width: int) -> "SlotTables":
        """No slot holds anything."""
        return cls(np.zeros((slots, width), np.int32), [0] * slots, np.zeros((slots, NUM_COLUMNS), np.int32))

    def take(self, slot: int, settings: Int32[np.ndarray, " C"]) -> None:
        """A sequence begins in a slot."""
        self.filled[slot] = 0
        self.settings[slot] = settings

    def update(self, slot: int, pages: list[int]) -> None:
        """Copies the pages that a sequence has got since."""
        filled = self.filled[slot]
        if len(pages) != filled:
            self.pages[slot, filled : len(pages)] = pages[filled:]
            self.filled[slot] = len(pages)


def pack(plan: StepPlan, program: Program, tables: SlotTables) -> Int32[np.ndarray, " words"]:
    """The array of one step. Slots that are new to their sequences must have been taken in `tables`."""
    width = tables.pages.shape[1]
    words = np.zeros(batch_size(program, width), np.int32)
    batch = unpack(words, program, width)
    works = plan.works
    for work in works:
        tables.update(work.seq.slot, work.seq.pages)  # pyright: ignore[reportArgumentType]  # planned work has a slot
    slots = np.fromiter((work.seq.slot for work in works), np.int32, len(works))
    batch.page_table[: len(works)] = tables.pages[slots]
    batch.num_tokens[0] = plan.num_tokens
    batch.logit_token[:] = -1
    _pack_decodes(plan.decodes, slots, batch)
    _pack_prefills(plan.prefills, len(plan.decodes), batch)
    if plan.is_scoring:
        _pack_scores(plan.prefills, batch)
    else:
        _pack_samples(works, slots, tables, batch)
    return words


def _pack_decodes(decodes: tuple[Work, ...], slots: np.ndarray, batch: BatchFields) -> None:
    n = len(decodes)
    if not n:
        return
    position = np.fromiter((work.start for work in decodes), np.int32, n)
    on_device = np.fromiter((work.token_on_device for work in decodes), np.bool_, n)
    batch.tokens[:n] = np.fromiter(
        (0 if work.token_on_device else work.seq.tokens[-1] for work in decodes), np.int32, n
    )
    batch.row[:n] = batch.logit_token[:n] = np.arange(n, dtype=np.int32)
    batch.position[:n] = position
    batch.from_slot[:n] = np.where(on_device, slots[:n] + 1, 0)
    batch.decode_length[:n] = position + 1


def _pack_prefills(prefills: tuple[Work, ...], first_row: int, batch: BatchFields) -> None:
    at = first_row  # decodes are one token each
    for row, work in enumerate(prefills, start=first_row):
        end = at + work.count
        batch.tokens[at:end] = work.seq.tokens[work.start : work.end]
        batch.row[at:end] = row
        batch.position[at:end] = np.arange(work.start, work.end, dtype=np.int32)
        batch.chunk_start[row] = at
        batch.chunk_count[row] = work.count
        batch.chunk_position[row] = work.start
        if work.samples and not work.scores:
            batch.logit_token[row] = end - 1
        at = end
    # Rows without work begin where the tokens end: the rows' starts stay in order.
    batch.chunk_start[:first_row] = 0
    batch.chunk_start[first_row + len(prefills) :] = at


def _pack_samples(works: tuple[Work, ...], slots: np.ndarray, tables: SlotTables, batch: BatchFields) -> None:
    n = len(works)
    batch.sampling[:n] = tables.settings[slots]
    position = np.fromiter((work.end for work in works), np.int32, n)
    prompt_len = np.fromiter((work.seq.prompt_len for work in works), np.int32, n)
    batch.sampling[:n, Column.POSITION] = position
    batch.sampling[:n, Column.NUM_OUTPUTS] = position - prompt_len
    for row, work in enumerate(works):
        if not work.samples:
            batch.sampling[row, Column.FLAGS] = 0


def _pack_scores(works: tuple[Work, ...], batch: BatchFields) -> None:
    for start, work in zip(batch.chunk_start, works, strict=False):  # rows without work have starts, too
        rows = slice(start, start + work.count)
        batch.sampling[rows] = encode_score(work.seq.params.prompt_logprobs or 0)
        batch.sampling[rows, Column.TARGET] = work.seq.tokens[work.start + 1 : work.end + 1]
        batch.logit_token[rows] = np.arange(rows.start, rows.stop, dtype=np.int32)
