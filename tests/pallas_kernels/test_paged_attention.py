"""Attention over pages equals attention over plain arrays in float64, and touches nothing that is not its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_attention as kernel
from pallas_kernels.paged_attention import KVPages

NO_WINDOW = 1 << 30
LAYERS, LAYER = 2, 1
# The same for all tests, so that they share programs.
ROWS, LONGEST, TOTAL, TOKENS = 7, 400, 600, 340  # sequences, context of one and of all, queries of a prefill step
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}  # float32 sums of a few hundred terms


@dataclass(frozen=True)
class Shape:
    """Of a problem: N query heads, K kv heads, H head dim, S page size."""

    N: int
    K: int
    H: int
    S: int


class Cache:
    """Random contexts, spread over shuffled pages. Every slot that belongs to no context holds NaN, page 0 as well."""

    def __init__(self, shape: Shape, lengths: Sequence[int]):
        rng = np.random.default_rng(sum(lengths) + shape.N)
        self.shape, self.lengths = shape, lengths
        K, H, S = shape.K, shape.H, shape.S
        self.k = [rng.standard_normal((length, K, H), np.float32) for length in lengths]
        self.v = [rng.standard_normal((length, K, H), np.float32) for length in lengths]
        needed = [-(-length // S) for length in lengths]
        width, num_pages = LONGEST // S + 2, TOTAL // S + ROWS + 1
        free = iter(rng.permutation(np.arange(1, num_pages)))
        self.table = np.full((ROWS, width), num_pages + 7, np.int32)  # behind a context's end anything may stand
        k = np.full((LAYERS, num_pages, K, S, H), np.nan, np.float32)
        v = k.copy()
        for row, length in enumerate(lengths):
            self.table[row, : needed[row]] = [next(free) for _ in range(needed[row])]
            for token in range(length):
                page, slot = self.table[row, token // S], token % S
                k[LAYER, page, :, slot], v[LAYER, page, :, slot] = self.k[row][token], self.v[row][token]
        self.pages = KVPages(jnp.asarray(k), jnp.asarray(v))

    def attend(self, q, row: int, position: int, *, window: int = NO_WINDOW, softcap: float | None = None):
        """One query of one sequence, in float64."""
        group = self.shape.N // self.shape.K
        seen = slice(max(0, position - window + 1), position + 1)
        k = np.repeat(self.k[row][seen].astype(np.float64), group, axis=1)  # [C, N, H]
        v = np.repeat(self.v[row][seen].astype(np.float64), group, axis=1)
        logits = np.einsum("nh,cnh->nc", q.astype(np.float64), k) * self.shape.H**-0.5
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return np.einsum("nc,cnh->nh", weights / weights.sum(-1, keepdims=True), v)

    def queries(self, count: int) -> np.ndarray:
        rng = np.random.default_rng(count)
        return rng.standard_normal((count, self.shape.N, self.shape.H), np.float32) * 2


@lru_cache
def decode(scale: float, softcap: float | None):
    run = jax.jit(partial(kernel.decode_attention, scale=scale, softcap=softcap))
    return partial(run, layer=np.int32(LAYER))


@lru_cache
def ragged(scale: float, softcap: float | None):
    @jax.jit
    def run(q, pages, start, count, position, page_table, window, layer):
        blocks = kernel.query_blocks(start, count, position, q.shape[0])
        return kernel.ragged_attention(
            q, pages, blocks, layer=layer, page_table=page_table, window=window, scale=scale, softcap=softcap
        )

    return partial(run, layer=np.int32(LAYER))


def padded(values: Sequence[int]) -> np.ndarray:
    return np.pad(np.asarray(values, np.int32), (0, ROWS - len(values)))


def check_decode(shape: Shape, lengths: Sequence[int], *, window: int = NO_WINDOW, softcap: float | None = None):
    cache = Cache(shape, lengths)
    q = cache.queries(ROWS)
    run = decode(shape.H**-0.5, softcap)
    out = run(q, cache.pages, page_table=cache.table, lengths=padded(lengths), window=np.int32(window))
    np.testing.assert_array_equal(out[len(lengths) :], 0.0)
    for row, length in enumerate(lengths):
        want = cache.attend(q[row], row, length - 1, window=window, softcap=softcap) if length else 0.0
        np.testing.assert_allclose(out[row], want + np.zeros_like(q[row]), **TOLERANCE)


def check_ragged(
    shape: Shape,
    lengths: Sequence[int],
    counts: Sequence[int],
    *,
    tokens: int = TOKENS,
    window: int = NO_WINDOW,
    softcap: float | None = None,
    lead: int = 0,
):
    """The last `counts` tokens of each context are queries, behind `lead` tokens that belong to decode rows."""
    cache = Cache(shape, lengths)
    q = cache.queries(tokens)
    count = padded(counts)
    start = lead + np.cumsum(count, dtype=np.int32) - count
    first = padded(lengths) - count
    used = lead + int(count.sum())
    q[used:] = np.nan  # padding may hold anything
    out = np.asarray(ragged(shape.H**-0.5, softcap)(q, cache.pages, start, count, first, cache.table, np.int32(window)))
    for row, n in enumerate(counts):
        for i in range(n):
            token = start[row] + i
            want = cache.attend(q[token], row, first[row] + i, window=window, softcap=softcap)
            np.testing.assert_allclose(out[token], want, **TOLERANCE)
    np.testing.assert_array_equal(out[used:], 0.0)


HEADS = [Shape(3, 3, 64, 16), Shape(9, 3, 64, 16), Shape(7, 1, 80, 8), Shape(4, 1, 256, 64), Shape(14, 2, 80, 32)]
IDS = [f"N{s.N} K{s.K} H{s.H} S{s.S}" for s in HEADS]


@pytest.mark.parametrize("shape", HEADS, ids=IDS)
def test_decode_over_ragged_contexts_that_end_at_around_and_inside_of_pages(shape):
    S = shape.S
    check_decode(shape, [1, S - 1, S, S + 1, 0, 3 * S, 300])


@pytest.mark.parametrize("window", [1, 5, 16, 128, 129, 299, 10_000])
def test_a_decode_query_sees_its_window_and_nothing_before_it(window):
    check_decode(Shape(4, 2, 64, 16), [1, 17, 0, 128, 129, 300], window=window)


def test_decode_with_softcap():
    check_decode(Shape(4, 2, 64, 16), [40, 300], softcap=1.5)


def test_rows_without_a_context_yield_zeros():
    check_decode(Shape(4, 2, 64, 16), [0, 0, 0])


def test_nan_in_one_context_stays_in_its_row():
    cache = Cache(Shape(4, 2, 64, 16), [40, 150, 3])
    q = cache.queries(ROWS)
    run = decode(64**-0.5, None)
    lengths, window = padded([40, 150, 3]), np.int32(NO_WINDOW)
    clean = np.asarray(run(q, cache.pages, page_table=cache.table, lengths=lengths, window=window))
    page = cache.table[1, 2]
    bad = KVPages(cache.pages.k.at[LAYER, page, 0, 5, 0].set(jnp.nan), cache.pages.v)
    got = np.asarray(run(q, bad, page_table=cache.table, lengths=lengths, window=window))
    assert np.isnan(got[1, :2]).all(), "the two query heads of that kv head"
    np.testing.assert_array_equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("shape", HEADS, ids=IDS)
def test_prefill_of_whole_prompts_and_of_chunks_behind_a_context(shape):
    S = shape.S
    check_ragged(shape, [S, 5, 2 * S + 1, 40], [S, 5, S, 1])


def test_prefill_blocks_that_span_several_rows_and_rows_that_span_several_blocks():
    """137 tokens of one row take two blocks, the next three rows fit into one block's width."""
    check_ragged(Shape(4, 2, 64, 16), [137, 9, 1, 30, 290], [137, 9, 1, 30, 140])


def test_prefill_with_fewer_tokens_than_a_block():
    check_ragged(Shape(4, 2, 64, 16), [3, 2], [3, 2], tokens=7)


def test_prefill_rows_without_tokens_are_skipped():
    check_ragged(Shape(4, 2, 64, 16), [20, 33, 8, 150], [0, 12, 0, 3])


def test_prefill_behind_the_tokens_of_decode_rows():
    check_ragged(Shape(4, 2, 64, 16), [20, 150], [20, 130], lead=5)


@pytest.mark.parametrize("window", [1, 7, 64, 200])
def test_a_prefill_query_sees_its_window_and_nothing_before_it(window):
    check_ragged(Shape(4, 2, 64, 16), [400, 50], [150, 50], window=window)


def test_prefill_with_softcap():
    check_ragged(Shape(4, 2, 64, 16), [150, 20], [30, 20], softcap=1.5)


def test_the_work_list_covers_every_token_once_and_always_fits():
    make = jax.jit(kernel.query_blocks, static_argnums=3)
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows, tokens = int(rng.choice([1, 7])), int(rng.choice([8, 130, 600]))
        cuts = np.sort(rng.integers(0, tokens + 1, rows))
        count = np.diff(cuts, prepend=0).astype(np.int32)
        start = (cuts - count).astype(np.int32)
        position = rng.integers(0, 1000, rows).astype(np.int32)
        blocks = make(start, count, position, tokens)
        assert int(blocks.used) <= blocks.row.shape[0]
        seen = [
            (row, first + i, token + i)
            for row, token, size, first in zip(
                *(np.asarray(part)[: int(blocks.used)] for part in blocks[1:]), strict=True
            )
            for i in range(int(size))
        ]
        wanted = [(r, position[r] + i, start[r] + i) for r in range(rows) for i in range(count[r])]
        assert seen == wanted


def test_writing_leaves_every_foreign_slot_bit_identical():
    shape = Shape(4, 2, 64, 8)
    cache = Cache(shape, [20, 9])
    rng = np.random.default_rng(1)
    k, v = rng.standard_normal((2, 5, 2, 64), np.float32)
    page = np.asarray([cache.table[0, 0], cache.table[1, 1], 0, 0, 0], np.int32)  # two tokens and three of padding
    slot = np.asarray([7, 1, 0, 0, 0], np.int32)
    write = jax.jit(kernel.write_kv)
    after = write(cache.pages, k, v, layer=np.int32(LAYER), page=page, slot=slot)
    for old, new, values in zip(cache.pages, after, (k, v), strict=True):
        old, new = np.array(old), np.array(new)
        for token in range(2):
            np.testing.assert_array_equal(new[LAYER, page[token], :, slot[token]], values[token])
            old[LAYER, page[token], :, slot[token]] = values[token]
        np.testing.assert_array_equal(old[:, 1:].view(np.uint32), new[:, 1:].view(np.uint32))
        np.testing.assert_array_equal(old[0].view(np.uint32), new[0].view(np.uint32))


def test_a_narrow_cache_rounds_what_is_written():
    pages = KVPages(*(jnp.zeros((1, 2, 1, 8, 64), jnp.bfloat16) for _ in "kv"))
    k = np.random.default_rng(2).standard_normal((1, 1, 64)).astype(np.float32)
    one, zero = np.ones(1, np.int32), np.int32(0)
    after = jax.jit(kernel.write_kv)(pages, k, 2 * k, layer=zero, page=one, slot=one)
    np.testing.assert_array_equal(after.k[0, 1, 0, 1], k[0, 0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(after.v[0, 1, 0, 1], (2 * k)[0, 0].astype(jnp.bfloat16))
