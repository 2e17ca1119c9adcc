"""Attention over pages equals attention over plain arrays in float64, and touches nothing that is not its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import kv_pages
from pallas_kernels import paged_attention as kernel
from pallas_kernels.attention_work import query_blocks
from tests.kv_cache import KV_DTYPES, SCALED, numbers, poisoned_pages

NO_WINDOW = 1 << 30
LAYERS, LAYER = 2, 1
# The same for all tests, so that they share programs.
ROWS, LONGEST, TOTAL, TOKENS = 7, 400, 720, 340  # sequences, context of one and of all, queries of a prefill step
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}  # float32 sums of a few hundred terms


@dataclass(frozen=True)
class Shape:
    """Of a problem: N query heads, K kv heads, H head dim, S page size."""

    N: int
    K: int
    H: int
    S: int


class Cache:
    """Random contexts, spread over shuffled pages. Every slot that belongs to no context holds NaN, page 0 as well.

    `exact` is what was written, `k` and `v` are what the cache keeps of it, by sequence.
    """

    def __init__(self, shape: Shape, lengths: Sequence[int], kv_dtype: str = "float32"):
        rng = np.random.default_rng(sum(lengths) + shape.N)
        self.shape, self.lengths = shape, lengths
        K, H, S = shape.K, shape.H, shape.S
        self.exact = [rng.standard_normal((2, length, K, H), np.float32) for length in lengths]
        needed = [-(-length // S) for length in lengths]
        width, num_pages = LONGEST // S + 2, TOTAL // S + ROWS + 1
        free = iter(rng.permutation(np.arange(1, num_pages)))
        self.table = np.full((ROWS, width), num_pages + 7, np.int32)  # behind a context's end anything may stand
        place: list[tuple[np.ndarray, np.ndarray]] = []  # page and slot of each token
        for row, length in enumerate(lengths):
            self.table[row, : needed[row]] = [next(free) for _ in range(needed[row])]
            at = np.arange(length, dtype=np.int32)
            place.append((self.table[row, at // S], at % S))
        pages = poisoned_pages((LAYERS, num_pages, K, S, H), kv_dtype)
        rest = TOTAL - sum(lengths)  # padding, to page 0
        k, v = np.pad(np.concatenate(self.exact, 1), ((0, 0), (0, rest), (0, 0), (0, 0)), constant_values=np.nan)
        page, slot = (np.pad(np.concatenate(part), (0, rest)) for part in zip(*place, strict=True))
        self.pages = write(pages, k, v, layer=np.int32(LAYER), page=page, slot=slot)
        kept_k, kept_v = numbers(self.pages, kv_dtype)
        self.k = [kept_k[LAYER, page, :, slot] for page, slot in place]
        self.v = [kept_v[LAYER, page, :, slot] for page, slot in place]

    def attend(
        self, q, row: int, position: int, *, window: int = NO_WINDOW, softcap: float | None = None, exact: bool = False
    ):
        """One query of one sequence, in float64, over what the cache keeps or over what was written."""
        group = self.shape.N // self.shape.K
        seen = slice(max(0, position - window + 1), position + 1)
        k, v = self.exact[row] if exact else (self.k[row], self.v[row])
        k = np.repeat(k[seen].astype(np.float64), group, axis=1)  # [C, N, H]
        v = np.repeat(v[seen].astype(np.float64), group, axis=1)
        logits = np.einsum("nh,cnh->nc", q.astype(np.float64), k) * self.shape.H**-0.5
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return np.einsum("nc,cnh->nh", weights / weights.sum(-1, keepdims=True), v)

    def queries(self, count: int) -> np.ndarray:
        rng = np.random.default_rng(count)
        return rng.standard_normal((count, self.shape.N, self.shape.H), np.float32) * 2


write = jax.jit(kv_pages.write_kv)


@lru_cache
def decode(scale: float, softcap: float | None):
    run = jax.jit(partial(kernel.decode_attention, scale=scale, softcap=softcap))
    return partial(run, layer=np.int32(LAYER))


@lru_cache
def ragged(scale: float, softcap: float | None):
    @jax.jit
    def run(q, pages, start, count, position, page_table, window, layer):
        blocks = query_blocks(start, count, position, q.shape[0], size=kernel.QUERY_BLOCK)
        return kernel.ragged_attention(
            q, pages, blocks, layer=layer, page_table=page_table, window=window, scale=scale, softcap=softcap
        )

    return partial(run, layer=np.int32(LAYER))


def padded(values: Sequence[int]) -> np.ndarray:
    return np.pad(np.asarray(values, np.int32), (0, ROWS - len(values)))


def check_decode(
    shape: Shape,
    lengths: Sequence[int],
    *,
    kv_dtype: str = "float32",
    window: int = NO_WINDOW,
    softcap: float | None = None,
):
    cache = Cache(shape, lengths, kv_dtype)
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
    kv_dtype: str = "float32",
    tokens: int = TOKENS,
    window: int = NO_WINDOW,
    softcap: float | None = None,
    lead: int = 0,
):
    """The last `counts` tokens of each context are queries, behind `lead` tokens that belong to decode rows."""
    cache = Cache(shape, lengths, kv_dtype)
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
    bad = cache.pages._replace(k=cache.pages.k.at[LAYER, page, 0, 5, 0].set(jnp.nan))
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


class TestFormats:
    """Of the cache: over what it keeps of K and V, attention is as exact as over float32."""

    HEADS = (Shape(3, 3, 64, 16), Shape(9, 3, 64, 16), Shape(14, 2, 80, 32))
    NARROW = KV_DTYPES[1:]

    @pytest.mark.parametrize("shape", HEADS, ids=["MHA", "GQA", "MQA of two"])
    @pytest.mark.parametrize("kv_dtype", NARROW)
    def test_decode(self, kv_dtype: str, shape: Shape) -> None:
        S = shape.S
        check_decode(shape, [1, S - 1, S, S + 1, 0, 3 * S, 300], kv_dtype=kv_dtype)

    @pytest.mark.parametrize("shape", HEADS, ids=["MHA", "GQA", "MQA of two"])
    @pytest.mark.parametrize("kv_dtype", NARROW)
    def test_prefill(self, kv_dtype: str, shape: Shape) -> None:
        S = shape.S
        check_ragged(shape, [S, 5, 2 * S + 1, 40, 200], [S, 5, S, 1, 137], kv_dtype=kv_dtype)

    @pytest.mark.parametrize("kv_dtype", NARROW)
    def test_windows_and_softcap(self, kv_dtype: str) -> None:
        for window in (1, 16, 129):
            check_decode(Shape(9, 3, 64, 16), [1, 17, 0, 128, 129, 300], window=window, kv_dtype=kv_dtype)
            check_ragged(Shape(9, 3, 64, 16), [200, 50], [150, 50], window=window, kv_dtype=kv_dtype)
        check_decode(Shape(9, 3, 64, 16), [40, 300], softcap=1.5, kv_dtype=kv_dtype)
        check_ragged(Shape(9, 3, 64, 16), [150, 20], [30, 20], softcap=1.5, kv_dtype=kv_dtype)

    @pytest.mark.parametrize("part", ["k", "v"])
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("kv_dtype", SCALED)
    def test_what_is_not_finite_is_seen_by_its_row_alone(self, kv_dtype: str, bad: float, part: str) -> None:
        """A token of the second sequence is written anew; int8 must not make a number of it."""
        shape = Shape(4, 2, 64, 16)
        cache = Cache(shape, [40, 150, 3], kv_dtype)
        q, table, lengths = cache.queries(ROWS), cache.table, padded([40, 150, 3])
        run = partial(decode(64**-0.5, None), q, page_table=table, lengths=lengths, window=np.int32(NO_WINDOW))
        clean = np.asarray(run(cache.pages))
        token = cache.exact[1][:, 37].copy()
        token["kv".index(part), 0, 11] = bad
        page, slot = table[1, [37 // 16]], np.asarray([37 % 16], np.int32)
        got = np.asarray(run(write(cache.pages, *token[:, None], layer=np.int32(LAYER), page=page, slot=slot)))
        assert np.isnan(got[1, :2]).all(), "the two query heads of that kv head"
        np.testing.assert_array_equal(got[1, 2:], clean[1, 2:])
        np.testing.assert_array_equal(got[[0, 2]], clean[[0, 2]])

    @pytest.mark.parametrize(("kv_dtype", "step"), [("bfloat16", 2**-8), ("float16", 2**-11), ("fp8_e4m3", 2**-4)])
    def test_a_float_format_is_as_near_to_what_was_written_as_its_mantissa(self, kv_dtype: str, step: float) -> None:
        self.check_near(kv_dtype, lambda x: np.maximum(np.abs(x) * step, np.abs(x).max(-1, keepdims=True) * 2e-6))

    def test_int8_is_as_near_to_what_was_written_as_half_a_step(self) -> None:
        self.check_near("int8", lambda x: np.broadcast_to(np.abs(x).max(-1, keepdims=True) / 254, x.shape))

    def check_near(self, kv_dtype: str, error: Callable[[np.ndarray], np.ndarray]) -> None:
        """Where K is off by `error(K)`, no logit moves by more than δ, so the weights by tanh(δ/2) in all at most; each
        output by that much of the range of V, and by the largest error of V."""
        shape, lengths = Shape(9, 3, 64, 16), [1, 16, 150, 300]
        cache = Cache(shape, lengths, kv_dtype)
        q = cache.queries(ROWS) / 4
        run = decode(shape.H**-0.5, None)
        window = np.int32(NO_WINDOW)
        out = np.asarray(run(q, cache.pages, page_table=cache.table, lengths=padded(lengths), window=window))
        for row, length in enumerate(lengths):
            k, v = (np.repeat(part.astype(np.float64), 3, axis=1) for part in cache.exact[row])  # [C, N, H]
            delta = np.einsum("nh,cnh->nc", np.abs(q[row]), error(k)).max(-1, keepdims=True) * shape.H**-0.5
            bound = np.tanh(delta / 2) * (v.max(0) - v.min(0)) + error(v).max(0) + 1e-5
            off = np.abs(out[row] - cache.attend(q[row], row, length - 1, exact=True))
            assert (off <= bound).all()
            assert off.max() > bound.max() / 1000, "a bound that is not far from what happens"
