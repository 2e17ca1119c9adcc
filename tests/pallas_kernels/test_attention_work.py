"""The work lists of attention hold all work of a step once, whatever the step, and never overflow."""

from functools import partial

import jax
import numpy as np
import pytest

from pallas_kernels import attention_work
from pallas_kernels.attention_work import DecodeParts, QueryBlocks

blocks_of = jax.jit(attention_work.query_blocks, static_argnums=3, static_argnames="size")
padded_blocks_of = jax.jit(attention_work.padded_query_blocks, static_argnums=4, static_argnames="size")
parts_of = jax.jit(attention_work.decode_parts, static_argnames=("block", "num_parts", "part", "cover_empty"))


def random_chunks(rng: np.random.Generator, rows: int, tokens: int, lead: int = 0) -> tuple[np.ndarray, ...]:
    """Starts, counts and first positions of rows, behind `lead` tokens of others."""
    cuts = np.sort(rng.integers(lead, tokens + 1, rows))
    count = np.diff(cuts, prepend=lead).astype(np.int32)
    return (cuts - count).astype(np.int32), count, rng.integers(0, 1000, rows).astype(np.int32)


def covered(blocks: QueryBlocks) -> list[tuple[int, int, int]]:
    """Row, position and token of everything in the blocks, in order."""
    assert int(blocks.used) <= blocks.row.shape[0]
    return [
        (int(row), int(first + i), int(token + i))
        for row, token, size, first in zip(*(np.asarray(part)[: int(blocks.used)] for part in blocks[1:]), strict=True)
        for i in range(int(size))
    ]


@pytest.mark.parametrize(("rows", "tokens", "size"), [(1, 8, 128), (7, 130, 128), (7, 600, 42), (7, 130, 1)])
def test_query_blocks_cover_every_token_once(rows: int, tokens: int, size: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        start, count, position = random_chunks(rng, rows, tokens)
        blocks = blocks_of(start, count, position, tokens, size=size)
        assert covered(blocks) == [(r, position[r] + i, start[r] + i) for r in range(rows) for i in range(count[r])]
        assert (np.asarray(blocks.size)[int(blocks.used) :] == 0).all()


@pytest.mark.parametrize(("rows", "tokens", "size"), [(1, 8, 128), (7, 130, 42)])
def test_padded_query_blocks_also_cover_what_is_behind_the_last_row(rows: int, tokens: int, size: int) -> None:
    """Every token but those of rows that decode; padding lies in front of position 0."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        decodes = int(rng.integers(0, rows))
        chunks = random_chunks(rng, rows - decodes, int(rng.integers(decodes, tokens + 1)), lead=decodes)
        start, count, position = (np.pad(part, (decodes, 0)) for part in chunks)
        lengths = np.where(np.arange(rows) < decodes, 5, 0).astype(np.int32)
        got = covered(padded_blocks_of(start, count, position, lengths, tokens, size=size))
        assert [token for _, _, token in got] == list(range(decodes, tokens))
        for row, place, token in got:
            if row < rows:
                assert place == position[row] + token - start[row]
            else:
                assert place == token - tokens


def read_parts(parts: DecodeParts, lengths: np.ndarray, block: int) -> dict[int, list[tuple[int, int]]]:
    """First and last block of each row's parts; checks that both lists agree."""
    items, rows = np.asarray(parts.items), np.asarray(parts.rows)
    real = items[:, 3] > 0
    assert real.sum() == rows[:, 1].sum() <= len(items)
    found: dict[int, list[tuple[int, int]]] = {}
    for row, (first, count) in enumerate(rows):
        mine = items[first : first + count]
        assert (mine[:, 0] == row).all()
        assert (mine[:, 3] == count).all()
        found[row] = [(int(a), int(b)) for a, b in mine[:, 1:3]]
        flat = [block for pair in found[row] for block in range(*pair)]
        assert flat == list(range(-(-int(lengths[row]) // block)))
    return found


@pytest.mark.parametrize("cover_empty", [False, True])
@pytest.mark.parametrize("num_parts", [8, 40])
def test_parts_cover_every_context_and_share_the_list_evenly(num_parts: int, cover_empty: bool) -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        lengths = (rng.integers(0, 5000, 7) * rng.integers(0, 2, 7)).astype(np.int32)
        parts = parts_of(lengths, block=64, num_parts=num_parts, part=None, cover_empty=cover_empty)
        found = read_parts(parts, lengths, 64)
        assert all(bool(pairs) == (cover_empty or lengths[row] > 0) for row, pairs in found.items())
        sizes = {stop - first for pairs in found.values() for first, stop in pairs[:-1]}
        assert len(sizes) <= 1, "all but a row's last are of one size"


def test_one_long_context_takes_as_many_parts_as_there_are() -> None:
    lengths = np.asarray([64 * 320, 0, 0, 0], np.int32)
    found = read_parts(parts_of(lengths, block=64, num_parts=36, part=None, cover_empty=False), lengths, 64)
    assert len(found[0]) == 32


def test_fixed_parts_of_a_context_do_not_depend_on_the_others() -> None:
    make = partial(parts_of, block=64, num_parts=32, part=3, cover_empty=True)
    alone, among = np.asarray([700, 0, 0, 0], np.int32), np.asarray([700, 1500, 64, 1], np.int32)
    cut = [read_parts(make(lengths), lengths, 64)[0] for lengths in (alone, among)]
    assert cut[0] == cut[1] == [(0, 3), (3, 6), (6, 9), (9, 11)]
