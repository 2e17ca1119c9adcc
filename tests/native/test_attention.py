"""The native attention equals attention over plain arrays in float64, on every instruction set of this machine, and a
sequence's result is the same bits whatever else the step holds and however many threads work.

The C++ of it has a test of its own, `attention_test.cc`, which also runs under sanitizers.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from atoma_jax import ops
from atoma_jax.native.library import Library
from pallas_kernels import kv_pages
from pallas_kernels.attention_work import QueryBlocks
from tests.kv_cache import KV_DTYPES, SCALED, numbers, poisoned_pages

NO_WINDOW = 1 << 30
LAYERS, LAYER = 2, 1
BACKEND = ops.Backend(platform="cpu", operands="float32", weight_layout="rows", kernels="native")
Variants = Callable[[], Iterator[str]]
BLOCK = 128  # queries of one entry of the work list, at most
TOLERANCE = 2e-5  # float32 sums of a few hundred terms


@pytest.fixture(autouse=True)
def _loaded(kernels: Library) -> None:
    """Every test calls kernels."""


@pytest.fixture
def variants(kernels: Library) -> Variants:
    """Loops over the instruction sets of this machine, each in force while its turn lasts."""

    def each() -> Iterator[str]:
        for variant in kernels.supported_variants():
            with kernels.forced(variant=variant):
                yield variant

    return each


@dataclass(frozen=True)
class Shape:
    """Of a problem: N query heads, K kv heads, H head dim, S page size."""

    N: int
    K: int
    H: int
    S: int


@dataclass(frozen=True)
class Row:
    """A sequence: its context with this step's tokens, and how many those are. One that decodes has one."""

    length: int
    count: int = 1
    decodes: bool = True
    seed: int = 0  # of its values

    def values(self, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
        """Queries of this step, [count, N, H], and K and V of all its tokens, [2, length, K, H]."""
        rng = np.random.default_rng((self.length, self.seed))
        kv = rng.standard_normal((2, self.length, shape.K, shape.H), np.float32)
        q = rng.standard_normal((self.length, shape.N, shape.H), np.float32) * 2
        return q[self.length - self.count :], kv


def prefill(length: int, count: int, seed: int = 0) -> Row:
    return Row(length, count, decodes=False, seed=seed)


class Step:
    """The arrays of one step: rows over shuffled pages, in a cache that is NaN wherever nothing belongs."""

    def __init__(self, shape: Shape, rows: Sequence[Row], kv_dtype: str = "float32", *, shuffle: int = 0):
        self.shape, self.rows, self.kv_dtype = shape, rows, kv_dtype
        S = shape.S
        width = max(-(-row.length // S) for row in rows) + 1
        num_pages = -(-(sum(-(-row.length // S) for row in rows) + 1) // 64) * 64  # few sizes: they share programs
        free = iter(np.random.default_rng(shuffle).permutation(np.arange(1, num_pages)))
        self.table = np.full((len(rows), width), num_pages + 7, np.int32)  # behind a context's end anything may stand
        before: list[tuple[np.ndarray, ...]] = []
        tokens: list[tuple[np.ndarray, ...]] = []
        self.first_token: list[int] = []
        taken = 0
        for number, row in enumerate(rows):
            self.table[number, : -(-row.length // S)] = [next(free) for _ in range(-(-row.length // S))]
            q, kv = row.values(shape)
            at = np.arange(row.length)
            page, slot = self.table[number, at // S], (at % S).astype(np.int32)
            old = row.length - row.count
            before.append((kv[0, :old], kv[1, :old], page[:old], slot[:old]))
            now = (q, kv[0, old:], kv[1, old:], page[old:], slot[old:])
            if row.decodes and not row.count:
                now = nothing(shape, 1)  # it has its token all the same
            tokens.append(now)
            self.first_token.append(taken)
            taken += len(now[0])
        tokens.append(nothing(shape, 3))
        self.tokens = [np.concatenate(part) for part in zip(*tokens, strict=True)]
        self.used = taken
        k, v, page, slot = (padded(np.concatenate(part), 1024) for part in zip(*before, strict=True))
        empty = poisoned_pages((LAYERS, num_pages, shape.K, S, shape.H), kv_dtype)
        self.pages = write(empty, k, v, layer=np.int32(LAYER), page=page, slot=slot)

    def batch(self) -> ops.AttentionBatch:
        lengths = [row.length if row.decodes and row.count else 0 for row in self.rows]
        pieces = [
            (number, self.first_token[number] + at, min(BLOCK, row.count - at), row.length - row.count + at)
            for number, row in enumerate(self.rows)
            for at in range(0, 0 if row.decodes else row.count, BLOCK)
        ]
        blocks = None
        if pieces:
            unused = np.full((3, 4), 99, np.int32)
            blocks = QueryBlocks(jnp.int32(len(pieces)), *jnp.asarray(np.concatenate([pieces, unused]), jnp.int32).T)
        return ops.AttentionBatch(
            page=jnp.asarray(self.tokens[3]),
            slot=jnp.asarray(self.tokens[4]),
            page_table=jnp.asarray(self.table),
            decode_lengths=jnp.asarray(lengths, jnp.int32),
            blocks=blocks,
            parts=None,
        )

    def run(self, *, window: int = NO_WINDOW, softcap: float | None = None) -> tuple[np.ndarray, ops.KVPages]:
        batch, tokens = self.batch(), self.tokens
        if batch.blocks is None:  # a program that only decodes has a token a row
            tokens = [part[: len(self.rows)] for part in tokens]
            batch = dataclasses.replace(batch, page=tokens[3], slot=tokens[4])
        run = attend(self.shape.H**-0.5, softcap)
        out, pages = run(*tokens[:3], self.pages, batch, layer=np.int32(LAYER), window=np.int32(window))
        return np.asarray(out), pages

    def results(self, out: np.ndarray) -> list[np.ndarray]:
        """Of each row's tokens."""
        return [out[first : first + row.count] for first, row in zip(self.first_token, self.rows, strict=True)]

    def check(self, *, window: int = NO_WINDOW, softcap: float | None = None) -> None:
        """Every token against float64, over what the cache keeps; zeros where nobody asked."""
        out, pages = self.run(window=window, softcap=softcap)
        kept = numbers(pages, self.kv_dtype)
        for number, (row, got) in enumerate(zip(self.rows, self.results(out), strict=True)):
            at = np.arange(row.length)
            k, v = (part[LAYER, self.table[number, at // self.shape.S], :, at % self.shape.S] for part in kept)
            q, _ = row.values(self.shape)
            want = reference(q, k, v, window, softcap)
            np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=TOLERANCE)
            if row.decodes and not row.count:
                np.testing.assert_array_equal(out[self.first_token[number]], 0.0)
        np.testing.assert_array_equal(out[self.used :], 0.0)


def nothing(shape: Shape, tokens: int) -> tuple[np.ndarray, ...]:
    """Tokens of padding."""
    q, kv = (np.full((tokens, n, shape.H), np.nan, np.float32) for n in (shape.N, shape.K))
    return q, kv, kv, *np.zeros((2, tokens), np.int32)


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int, softcap: float | None) -> np.ndarray:
    """The last tokens of a sequence, q [T, N, H], over all of it, k and v [C, K, H], in float64."""
    (T, N, H), (C, K, _) = q.shape, k.shape
    logits = np.einsum("tkgh,ckh->tkgc", q.reshape(T, K, N // K, H).astype(np.float64), k) * H**-0.5
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    back = np.arange(C - T, C)[:, None] - np.arange(C)  # [T, C]: how far behind the query each token lies
    logits = np.where(((back >= 0) & (back < window))[:, None, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True, initial=-1e30))
    return (np.einsum("tkgc,ckh->tkgh", weights, v) / weights.sum(-1, keepdims=True)).reshape(T, N, H)


def padded(array: np.ndarray, multiple: int) -> np.ndarray:
    """Zeros behind it: tokens of padding, which go to page 0."""
    return np.pad(array, [(0, -len(array) % multiple), *[(0, 0)] * (array.ndim - 1)])


write = jax.jit(kv_pages.write_kv)


@lru_cache
def attend(scale: float, softcap: float | None) -> Callable[..., tuple[Array, ops.KVPages]]:
    def run(
        q: Array, k: Array, v: Array, pages: ops.KVPages, batch: ops.AttentionBatch, *, layer: Array, window: Array
    ) -> tuple[Array, ops.KVPages]:
        what = {"layer": layer, "window": window, "scale": scale, "softcap": softcap}
        out, pages = ops.attend(q, k, v, pages, batch, BACKEND, **what)
        return ops.computed(out, BACKEND).reshape(q.shape), pages

    return jax.jit(run)


HEADS = [
    Shape(3, 3, 64, 16),
    Shape(9, 3, 64, 16),
    Shape(7, 1, 80, 8),
    Shape(14, 2, 96, 16),
    Shape(8, 2, 128, 32),
    Shape(4, 1, 256, 16),
    Shape(50, 1, 10, 5),
    Shape(2, 1, 2, 1),
]
IDS = [f"N{s.N} K{s.K} H{s.H} S{s.S}" for s in HEADS]
GQA = Shape(9, 3, 64, 16)


@pytest.mark.parametrize("shape", HEADS, ids=IDS)
def test_contexts_that_end_at_around_and_inside_of_pages(shape: Shape, variants: Variants) -> None:
    """Rows that decode, one of them idle, before whole prompts and chunks of prompts."""
    S = shape.S
    decodes = [Row(1), Row(S), Row(S + 1), Row(3 * S - 1), Row(256), Row(257), Row(300)]
    rows = [*decodes, prefill(S + 1, S + 1), prefill(70, 3), prefill(190, 140), prefill(1, 1)]
    step = Step(shape, rows)
    only_decodes = Step(shape, [*decodes[:3], Row(0, 0), *decodes[3:]])
    for _ in variants():
        step.check()
        only_decodes.check()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES[1:])
def test_every_type_of_cache(kv_dtype: str, variants: Variants) -> None:
    steps = [
        Step(shape, [Row(1), Row(33), Row(300), prefill(40, 40), prefill(150, 20)], kv_dtype)
        for shape in (GQA, Shape(4, 1, 20, 8))
    ]
    for _ in variants():
        for step in steps:
            step.check(window=120)


@pytest.mark.parametrize("window", [1, 5, 64, 129, 256, 299])
def test_a_query_sees_its_window_and_nothing_before_it(window: int, variants: Variants) -> None:
    rows = [Row(1), Row(128), Row(300), Row(520), prefill(300, 140), prefill(60, 60)]
    step = Step(Shape(4, 2, 64, 16), rows)
    for _ in variants():
        step.check(window=window)


@pytest.mark.parametrize("softcap", [1.5, 50.0])
def test_softcap(softcap: float, variants: Variants) -> None:
    step = Step(Shape(4, 2, 64, 16), [Row(40), Row(300), prefill(150, 30)])
    for _ in variants():
        step.check(softcap=softcap, window=100)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_cache_holds_the_bits_that_xla_writes(kv_dtype: str, variants: Variants) -> None:
    """All of it but the scratch page: rounding, halves, subnormal codes, infinities and NaN alike."""
    step = Step(GQA, [prefill(40, 40), Row(17), prefill(90, 3)], kv_dtype)
    step.tokens[1] *= np.exp2(np.random.default_rng(0).integers(-20, 12, step.tokens[1].shape)).astype(np.float32)
    step.tokens[1][3, 0, 5], step.tokens[2][4, 1, 6], step.tokens[2][5, 2, :] = np.nan, -np.inf, 0.0
    step.tokens[2][6, 0, :4] = [1.0, 0.5, 253 / 254, -129 / 254]  # over 127: halves
    _, k, v, page, slot = step.tokens
    want = write(step.pages, k, v, layer=np.int32(LAYER), page=page, slot=slot)
    for _ in variants():
        _, got = step.run()
        for part, reference in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(bits(part[:, 1:]), bits(reference[:, 1:]))


def bits(array: Array) -> np.ndarray:
    """NaN as one value each, as nobody reads which."""
    values = np.asarray(array)
    if values.dtype.kind == "f":
        values = np.where(np.isnan(values), values.dtype.type(np.nan), values)
    return values.view(f"u{values.itemsize}")


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_a_sequence_has_the_same_bits_in_any_step(kv_dtype: str, variants: Variants) -> None:
    """Alone and among others, in any order and on any pages; and a prompt however it is cut into chunks."""
    decodes = [Row(1), Row(700), Row(40), Row(257, seed=1), Row(257, seed=2)]
    prompts = [prefill(150, 150), prefill(9, 4), prefill(300, 20)]
    for _ in variants():
        together, _ = (step := Step(GQA, [*decodes, *prompts], kv_dtype)).run()
        results = dict(zip([*decodes, *prompts], step.results(together), strict=True))
        for rows in ([*decodes[::-1], prompts[0]], *([row] for row in (*decodes, *prompts))):
            other = Step(GQA, rows, kv_dtype, shuffle=5)
            for row, got in zip(rows, other.results(other.run()[0]), strict=True):
                np.testing.assert_array_equal(got, results[row])
        whole = results[prompts[0]]
        for cut in (1, 37, 149):
            chunk = Step(GQA, [Row(33), prefill(150, cut)], kv_dtype)
            np.testing.assert_array_equal(chunk.results(chunk.run()[0])[1], whole[150 - cut :])


@pytest.mark.parametrize("kv_dtype", ["float32", "fp8_e4m3"])
def test_any_number_of_threads_gives_the_same_bits(kv_dtype: str, kernels: Library) -> None:
    """One long sequence that decodes is cut for several threads, too."""
    steps = [
        Step(Shape(4, 1, 64, 16), [Row(3000)], kv_dtype),
        Step(GQA, [Row(600), Row(3), prefill(200, 200), prefill(700, 50)], kv_dtype),
    ]
    for step in steps:
        with kernels.forced(threads=1):
            alone, cache = step.run()
        for threads in (2, 5):
            with kernels.forced(threads=threads):
                out, written = step.run()
            np.testing.assert_array_equal(out, alone)
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a[:, 1:]), bits(b[:, 1:])), written, cache)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", *SCALED])
@pytest.mark.parametrize(("part", "bad"), [("k", np.nan), ("v", np.nan), ("v", np.inf)])
def test_what_is_not_finite_is_seen_by_its_sequence_alone(
    kv_dtype: str, bad: float, part: str, variants: Variants
) -> None:
    rows = [Row(20), Row(300), prefill(40, 12), prefill(90, 60)]
    for _ in variants():
        clean, dirty = Step(GQA, rows, kv_dtype), Step(GQA, rows, kv_dtype)
        which = 1 + "kv".index(part)
        dirty.tokens[which][1, 0, 11] = bad  # the token of the second row
        dirty.tokens[which][dirty.first_token[3] + 5, 0, 11] = bad
        want, got = clean.results(clean.run()[0]), dirty.results(dirty.run()[0])
        assert not np.isfinite(got[1][0, :3]).all(), "the three query heads of that kv head"
        assert not np.isfinite(got[3][5:, :3]).all(axis=(1, 2)).any(), "that token and all that come behind it"
        np.testing.assert_array_equal(got[1][0, 3:], want[1][0, 3:])
        np.testing.assert_array_equal(got[3][:, 3:], want[3][:, 3:])
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[2], want[2])


def test_a_layer_is_written_and_read_in_place_inside_of_a_scan() -> None:
    """As models call it. The program needs no room for another cache."""
    step = Step(GQA, [Row(20), Row(40)])
    q, k, v, page, slot = (jnp.asarray(part[:2]) for part in step.tokens)
    batch = jax.tree.map(jnp.asarray, dataclasses.replace(step.batch(), page=page, slot=slot))

    @partial(jax.jit, donate_argnums=0)
    def run(pages: ops.KVPages, q: Array) -> tuple[Array, ops.KVPages]:
        def layer(carry: tuple, index: Array) -> tuple[tuple, None]:
            out, pages = carry
            out, pages = ops.attend(
                q + out, k, v, pages, batch, BACKEND, layer=index, window=jnp.int32(NO_WINDOW), scale=0.1, softcap=None
            )
            return (ops.computed(out, BACKEND).reshape(q.shape), pages), None

        return jax.lax.scan(layer, (jnp.zeros_like(q), pages), jnp.arange(LAYERS, dtype=jnp.int32))[0]

    compiled = run.lower(step.pages, q).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    size = step.pages.k.nbytes
    assert memory.alias_size_in_bytes >= 2 * size
    assert memory.temp_size_in_bytes < size / 4
    out, pages = compiled(step.pages, q)
    assert np.isnan(np.asarray(out)).all(), "the first layer holds nothing but NaN before these tokens"
    np.testing.assert_array_equal(np.asarray(pages.k)[0, page, :, slot], k)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"page": np.asarray([1, 99], np.int32)}, "token 1 goes to a page or slot that is not there"),
        ({"slot": np.asarray([16, 0], np.int32)}, "token 0 goes to a page or slot that is not there"),
        ({"decode_lengths": np.asarray([20, 400], np.int32)}, "the context of row 1 is not in its page table"),
        ({"page_table": np.full((2, 4), -1, np.int32)}, "the context of row 0 is not in its page table"),
    ],
    ids=["page", "slot", "length", "table"],
)
def test_an_index_that_points_nowhere_is_refused(broken: dict[str, np.ndarray], says: str) -> None:
    step = Step(GQA, [Row(20), Row(40)])
    q, k, v, page, slot = (part[:2] for part in step.tokens)
    batch = dataclasses.replace(step.batch(), page=page, slot=slot)
    run = attend(0.1, None)
    with pytest.raises(Exception, match=says):
        jax.block_until_ready(
            run(q, k, v, step.pages, dataclasses.replace(batch, **broken), layer=np.int32(0), window=np.int32(9))
        )
