"""What attention has to do in a step, as lists of fixed length: built once from the batch, shared by all layers.

Two lists. Sequences that prefill are cut into blocks of queries, each of which walks its context alone. Contexts of
sequences that decode are cut into parts, attended to apart and then combined, so that a few long ones keep a whole
GPU busy (flash decoding, arXiv:2311.01282 §3). Windows differ by layer: the kernels skip what a layer does not see.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32


class QueryBlocks(NamedTuple):
    """Blocks of queries of one sequence each. The first `used` entries hold work."""

    used: Int32[Array, ""]
    row: Int32[Array, " blocks"]  # of the sequence
    token: Int32[Array, " blocks"]  # first token of the block, in the flat batch
    size: Int32[Array, " blocks"]  # tokens
    position: Int32[Array, " blocks"]  # of the first token, in its sequence


class DecodeParts(NamedTuple):
    """Parts of the contexts of B sequences, in order of their rows. Contexts are counted in blocks of some tokens."""

    items: Int32[Array, "parts 4"]  # row, first block, block behind the last, parts of the row: 0 where it is no part
    rows: Int32[Array, "B 2"]  # first part and number of parts of each row


def query_blocks(
    start: Int32[Array, " B"], count: Int32[Array, " B"], position: Int32[Array, " B"], num_tokens: int, *, size: int
) -> QueryBlocks:
    """Cuts the ragged queries of a step into blocks of one sequence each.

    Args:
        start: first token of each row in the flat batch of `num_tokens`; rows lie in order, without gaps.
        count: tokens of each row, 0 for padding.
        position: of each row's first token in its sequence.
        num_tokens: size of the flat batch.
        size: tokens of a block, at most.
    """
    blocks_of_row = -(-count // size)
    ends = jnp.cumsum(blocks_of_row)
    block = jnp.arange(-(-num_tokens // size) + start.shape[0] - 1, dtype=jnp.int32)
    row = _owner(ends, block)
    offset = (block - (ends - blocks_of_row)[row]) * size
    return QueryBlocks(
        ends[-1], row, start[row] + offset, jnp.clip(count[row] - offset, 0, size), position[row] + offset
    )


def padded_query_blocks(
    start: Int32[Array, " B"],
    count: Int32[Array, " B"],
    position: Int32[Array, " B"],
    decode_lengths: Int32[Array, " B"],
    num_tokens: int,
    *,
    size: int,
) -> QueryBlocks:
    """`query_blocks` that also cover the tokens behind the last row, as one more row: each token is in one block or
    belongs to a sequence that decodes. Positions of that row are negative and end at 0: nothing is in front of them.
    """
    used = jnp.maximum(jnp.max(start + count), jnp.sum(decode_lengths > 0, dtype=jnp.int32))
    rest = num_tokens - used
    return query_blocks(
        jnp.append(start, used), jnp.append(count, rest), jnp.append(position, -rest), num_tokens, size=size
    )


def decode_parts(
    lengths: Int32[Array, " B"], *, block: int, num_parts: int, part: int | None, cover_empty: bool
) -> DecodeParts:
    """Cuts contexts into at most `num_parts` parts of nearly equal cost.

    Args:
        lengths: tokens of each context.
        block: tokens of a block.
        num_parts: length of the list, more than B.
        part: blocks of a part. None: as few as the list holds, which depends on all contexts of the step.
        cover_empty: rows without a context get an empty part, so that somebody writes their zeros.
    """
    B = lengths.shape[0]
    blocks = -(-lengths // block)
    if part is None:
        # ⌈b / p⌉ < b / p + 1, so that all rows together need less than sum / p + B.
        assert num_parts > B
        longest = jnp.maximum(1, -(-jnp.sum(blocks) // (num_parts - B)))
    else:
        longest = jnp.int32(part)
    parts = -(-blocks // longest)
    if cover_empty:
        parts = jnp.maximum(parts, 1)
    ends = jnp.cumsum(parts)
    index = jnp.arange(num_parts, dtype=jnp.int32)
    row = _owner(ends, index)
    first = (index - (ends - parts)[row]) * longest
    last = jnp.minimum(first + longest, blocks[row])
    items = jnp.stack([row, first, last, jnp.where(index < ends[-1], parts[row], 0)], axis=1)
    return DecodeParts(items, jnp.stack([ends - parts, parts], axis=1))


def _owner(ends: Int32[Array, " rows"], index: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """The row in whose run each index lies; behind the last run the last row."""
    # All pairs compared are one launch; a search is four.
    row = jnp.searchsorted(ends, index, side="right", method="compare_all")
    return jnp.minimum(row, ends.shape[0] - 1).astype(jnp.int32)
