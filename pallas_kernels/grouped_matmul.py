"""Products of rows with the weights of their experts (mixtures of experts), as plain XLA.

Pairs of token and expert are sorted by expert and cut into blocks of one expert each. A step has as many blocks as its
routing needs, and a block reads one expert's weights: experts without tokens cost nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

MIN_BLOCK, MAX_BLOCK = 8, 128  # rows that share a read of an expert's weights


class ExpertBlocks(NamedTuple):
    """The work list of one layer: P = T·k pairs of token and expert, pair t·k + i being the i-th choice of token t."""

    used: Int32[Array, ""]  # the first so many blocks hold work
    expert: Int32[Array, " blocks"]
    start: Int32[Array, " blocks"]  # first row of the block, among the sorted pairs
    stop: Int32[Array, " blocks"]  # behind its last row
    pair: Int32[Array, " P"]  # of each sorted row
    row: Int32[Array, " P"]  # of each pair, among the sorted ones


def expert_blocks(experts: Int32[Array, "T k"], count: int) -> ExpertBlocks:
    """Sorts the choices of a step's tokens, of `count` experts, and cuts them into blocks."""
    chosen = experts.reshape(-1)  # [P]
    P, M = chosen.shape[0], block_rows(chosen.shape[0], count)
    pair = jnp.argsort(chosen, stable=True).astype(jnp.int32)
    row = jnp.zeros(P, jnp.int32).at[pair].set(jnp.arange(P, dtype=jnp.int32))
    counts = jnp.zeros(count, jnp.int32).at[chosen].add(1)
    blocks_of = -(-counts // M)
    ends = jnp.cumsum(blocks_of)
    block = jnp.arange(P // M + min(P, count), dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(ends, block, side="right"), count - 1).astype(jnp.int32)
    ends_of = jnp.cumsum(counts)  # of each expert's rows
    start = (ends_of - counts)[expert] + (block - (ends - blocks_of)[expert]) * M
    stop = jnp.minimum(start + M, ends_of[expert])
    return ExpertBlocks(ends[-1].astype(jnp.int32), expert, start.astype(jnp.int32), stop.astype(jnp.int32), pair, row)


def block_rows(pairs: int, count: int) -> int:
    """Rows of a block: about twice an expert's share, so that most experts need one block."""
    rows = MIN_BLOCK
    while rows < MAX_BLOCK and rows * count < 2 * pairs:
        rows *= 2
    return rows


def sorted_rows(x: Float[Array, "T K"], blocks: ExpertBlocks, count: int) -> Float[Array, "padded K"]:
    """The tokens' rows in the order of the sorted pairs, with a block of zeros behind them."""
    P = blocks.pair.shape[0]
    rows = x[blocks.pair // (P // x.shape[0])]
    return jnp.pad(rows, ((0, block_rows(P, count)), (0, 0)))


def grouped_product(
    x: Float[Array, "padded K"],
    blocks: ExpertBlocks,
    product: Callable[[Array, Array], Array],
    N: int,
) -> Float32[Array, "padded N"]:
    """`product(rows, expert)` for each block of `sorted_rows`. Rows behind the last pair may hold anything finite."""
    M = x.shape[0] - blocks.pair.shape[0]

    def block(b: Array, y: Array) -> Array:
        rows = lax.dynamic_slice_in_dim(x, blocks.start[b], M)
        # Blocks go in order, so what a block writes behind its own end is overwritten by the next one.
        return lax.dynamic_update_slice_in_dim(y, product(rows, blocks.expert[b]), blocks.start[b], axis=0)

    return lax.fori_loop(0, blocks.used, block, jnp.zeros((x.shape[0], N), jnp.float32))


def combine(
    y: Float32[Array, "padded N"], blocks: ExpertBlocks, weights: Float32[Array, "T k"]
) -> Float32[Array, "T N"]:
    """Each token's weighted sum over its experts, from the rows of sorted pairs."""
    T, k = weights.shape
    return jnp.einsum("tkn,tk->tn", y[blocks.row].reshape(T, k, -1), weights)
