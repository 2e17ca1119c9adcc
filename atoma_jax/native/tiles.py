"""Packs rows of quantized weights into the tiles that the kernels read (`src/matmul.h`): compiled, or with numpy.

Rows come in any order and in chunks: a tile is filled by whoever has its rows. Threads may fill one weight at once.
"""

from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int64, Num, UInt8, UInt32

from atoma_jax.native.library import library
from atoma_jax.quant.qtensor import TILE, TILE_BLOCK
from atoma_jax.quant.tile_fields import STEPS, tile_fields

Rows: TypeAlias = np.ndarray[Any, np.dtype[np.int64]] | slice


def put_codes(
    codes: UInt8[np.ndarray, "n K"], bits: int, to: Rows, out: UInt8[np.ndarray, "tiles blocks bytes"]
) -> None:
    """Packs rows of a weight.

    Args:
        codes: below 2**bits.
        bits: 2, 3, 4, 5, 6 or 8.
        to: where each row goes in the weight.
        out: its codes; rows that fill it up are left as they are, inputs that do become zeros.
    """
    tiles, blocks, size = out.shape
    rows = _indices(to, tiles * TILE)
    assert size == TILE * TILE_BLOCK * bits // 8, (size, bits)
    assert codes.shape[0] == len(rows), (codes.shape, len(rows))
    assert (blocks - 1) * TILE_BLOCK < codes.shape[1] <= blocks * TILE_BLOCK, (codes.shape, blocks)
    kernels = library()
    if kernels is not None:
        kernels.pack_codes(np.ascontiguousarray(codes), bits, rows, out)
    else:
        put_codes_with_numpy(codes, bits, rows, out)


def put_factors(factors: Num[np.ndarray, "n groups"], to: Rows, out: Num[np.ndarray, "tiles filled lanes"]) -> None:
    """Scales, mins or supers of rows; groups that fill up the last block are left as they are."""
    rows = _indices(to, out.shape[0] * TILE)
    assert factors.shape[0] == len(rows), (factors.shape, len(rows))
    assert factors.shape[1] <= out.shape[1], (factors.shape, out.shape)
    kernels = library()
    if kernels is not None:
        kernels.pack_factors(np.ascontiguousarray(factors, out.dtype), rows, out)
    else:
        put_factors_with_numpy(factors, rows, out)


def put_codes_with_numpy(
    codes: UInt8[np.ndarray, "n K"],
    bits: int,
    rows: Int64[np.ndarray, " n"],
    out: UInt8[np.ndarray, "tiles blocks bytes"],
) -> None:
    """`put_codes` where nothing is compiled: several times slower."""
    tiles, blocks, _ = out.shape
    words = out.view(np.uint32).reshape(tiles, blocks, bits, TILE)
    words[rows // TILE, :, :, rows % TILE] = _packed(codes, bits, blocks)  # [n, blocks, words]


def put_factors_with_numpy(
    factors: Num[np.ndarray, "n groups"], rows: Int64[np.ndarray, " n"], out: Num[np.ndarray, "tiles filled lanes"]
) -> None:
    """`put_factors` likewise."""
    out[rows // TILE, : factors.shape[1], rows % TILE] = factors


def _packed(codes: UInt8[np.ndarray, "n K"], bits: int, blocks: int) -> UInt32[np.ndarray, "n blocks words"]:
    n, K = codes.shape
    if blocks * TILE_BLOCK > K:
        codes = np.pad(codes, ((0, 0), (0, blocks * TILE_BLOCK - K)))
    steps = np.ascontiguousarray(codes).view(np.uint32).reshape(n, blocks, STEPS)
    words = np.zeros((n, blocks, bits), np.uint32)
    for field in tile_fields(bits):
        part = steps[..., field.step] >> np.uint32(field.shift) & np.uint32((2**field.width - 1) * 0x01010101)
        words[..., field.word] |= part << np.uint32(field.bit)
    return words


def _indices(rows: Rows, N: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    indices = np.arange(N)[rows] if isinstance(rows, slice) else np.ascontiguousarray(rows, np.int64)
    assert indices.size == 0 or (indices.min() >= 0 and indices.max() < N), (indices, N)
    return indices
