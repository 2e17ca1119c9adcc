"""Packs rows of quantized weights into the tiles that the kernels read (`src/matmul.h`), with numpy.

Rows come in any order and in chunks: a tile is filled by whoever has its rows.
"""

from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Num, UInt8, UInt32

from atoma_jax.quant.qtensor import TILE, TILE_BLOCK

Rows: TypeAlias = np.ndarray[Any, np.dtype[np.int64]] | slice

_INPUTS = 4  # that lie together


def put_codes(
    codes: UInt8[np.ndarray, "n K"], bits: int, to: Rows, out: UInt8[np.ndarray, "tiles blocks bytes"]
) -> None:
    """Packs rows of a weight.

    Args:
        codes: below 2**bits.
        bits: 2, 4 or 8.
        to: where each row goes in the weight.
        out: its codes; inputs and rows that fill it up are left as they are.
    """
    tiles, blocks, _ = out.shape
    words = out.view(np.uint32).reshape(tiles, blocks, bits, TILE)
    packed = _packed(codes, bits, blocks)  # [n, blocks, words]
    rows = _indices(to, tiles * TILE)
    if len(rows) % TILE == 0 and rows[0] % TILE == 0 and bool((np.diff(rows) == 1).all()):
        first, count = rows[0] // TILE, len(rows) // TILE
        words[first : first + count] = packed.reshape(count, TILE, blocks, bits).transpose(0, 2, 3, 1)
    else:
        words[rows // TILE, :, :, rows % TILE] = packed


def put_factors(factors: Num[np.ndarray, "n groups"], to: Rows, out: Num[np.ndarray, "tiles filled lanes"]) -> None:
    """Scales, mins or supers of rows; groups that fill up the last block are left as they are."""
    rows = _indices(to, out.shape[0] * TILE)
    out[rows // TILE, : factors.shape[1], rows % TILE] = factors


def _packed(codes: UInt8[np.ndarray, "n K"], bits: int, blocks: int) -> UInt32[np.ndarray, "n blocks words"]:
    """Four inputs a word and, of fewer bits than eight, as many steps."""
    n, K = codes.shape
    if blocks * TILE_BLOCK > K:
        codes = np.pad(codes, ((0, 0), (0, blocks * TILE_BLOCK - K)))
    fields = np.ascontiguousarray(codes).view(np.uint32).reshape(n, blocks, 8 // bits, bits)
    words = fields[:, :, 0].copy()
    for at in range(1, 8 // bits):
        words |= fields[:, :, at] << np.uint32(bits * at)  # a code has no bits that reach the next byte
    return words


def _indices(rows: Rows, N: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(N)[rows] if isinstance(rows, slice) else rows
