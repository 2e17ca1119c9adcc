"""Steps of attention for tests: what decodes, what prefills, what is padding, and whether all of it came out right."""

from collections.abc import Sequence

import numpy as np

from pallas_kernels.kv_pages import KVPages
from tests.pallas_kernels.contexts import NO_WINDOW, Contexts, Heads, attention_of

B, T, LONGEST = 6, 128, 384  # rows and tokens of a step, positions of a page table


class Step:
    """Decodes first, then chunks of prefill, then padding, which is NaN."""

    def __init__(
        self,
        contexts: Contexts,
        decodes: Sequence[int],
        chunks: Sequence[tuple[int, int]] = (),
        tokens: int = T,
        seed: int = 0,
    ):
        """`decodes`: lengths of contexts, 0 for rows without one. `chunks`: first position and tokens."""
        heads, rng = contexts.heads, np.random.default_rng(seed)
        self.contexts = contexts
        self.rows: list[tuple[int, np.ndarray, np.ndarray]] = []  # row, tokens, positions
        self.lengths = np.pad(np.asarray(decodes, np.int32), (0, B - len(decodes)))
        self.chunks = np.zeros((3, B), np.int32)
        for row, length in enumerate(decodes):
            if length:
                self.rows.append((row, np.asarray([row]), np.asarray([length - 1])))
        used = len(decodes)
        for row, (position, count) in enumerate(chunks, start=len(decodes)):
            self.chunks[:, row] = used, count, position
            if count:
                self.rows.append((row, used + np.arange(count), position + np.arange(count)))
            used += count
        self.q, self.k, self.v = (
            np.full((tokens, n, heads.H), np.nan, np.float32) for n in (heads.N, heads.K, heads.K)
        )
        self.page, self.slot = np.zeros(tokens, np.int32), np.zeros(tokens, np.int32)
        for row, at, positions in self.rows:
            for x in (self.q, self.k, self.v):
                x[at] = rng.standard_normal((len(at), *x.shape[1:]))
            self.page[at], self.slot[at] = contexts.place(row, positions)

    def run(self, run, pages: KVPages, window: int = NO_WINDOW) -> tuple[np.ndarray, KVPages]:
        places = (self.page, self.slot, self.contexts.table, self.lengths, self.chunks)
        out, pages = run(self.q, self.k, self.v, pages, *places, np.int32(window))
        return np.asarray(out), pages

    def check(self, out: np.ndarray, pages: KVPages, *, window: int = NO_WINDOW, softcap: float | None = None) -> None:
        idle = np.ones(len(out), np.bool_)
        for row, at, positions in self.rows:
            want, error = attention_of(self.contexts, pages, self.q[at], row, positions, window=window, softcap=softcap)
            off = np.abs(out[at] - want)
            assert (off <= error).all(), f"row {row}: {off.max()} of {error.max()}"
            idle[at] = False
        np.testing.assert_array_equal(out[idle], 0.0)


def behind_long_contexts(heads: Heads, kv_dtype: str, *, as_bits: bool = True) -> Step:
    """Two chunks whose queries see several blocks of their contexts whole."""
    contexts = Contexts(heads, [370, 300, 1, 1, 1, 1], kv_dtype, width=LONGEST // heads.S, as_bits=as_bits)
    return Step(contexts, [], [(300, 70), (250, 50)])


def mixed(heads: Heads, kv_dtype: str, *, as_bits: bool = True) -> Step:
    """Three contexts decode: of one token, of one beyond a page, and a long one, cut into parts. Then a prompt of two
    blocks, one token, and a chunk behind a context; then padding."""
    lengths = [1, heads.S + 1, 300, 70, 41, 140]
    contexts = Contexts(heads, lengths, kv_dtype, width=LONGEST // heads.S, as_bits=as_bits)
    return Step(contexts, [1, heads.S + 1, 300], [(0, 70), (40, 1), (100, 40)])
