"""Exact float32 values of a `QTensor`'s numbers on the host, by numpy: what an export writes.

Owns the reverse of all layouts. Products with a `QTensor` on a device are those of `ops`.
"""

from typing import Any, TypeAlias

import numpy as np

from atoma_jax.quant.qtensor import TILE, TILE_BLOCK, QTensor
from atoma_jax.quant.tile_fields import STEPS, tile_fields

_Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
_Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


@np.errstate(invalid="ignore", over="ignore")  # as in `GroupCodes.values`, whose order of roundings this has
def dequantized(weight: QTensor) -> _Floats:
    """The values `[N, K]` of a weight without leading axes, whose children are numpy's; inputs in their own order."""
    N, K = weight.shape
    codes, scales = np.asarray(weight.codes), _flat(weight.scales, weight.scale_supers)
    mins = None if weight.mins is None else _flat(weight.mins, weight.min_supers)
    if weight.layout == "tiles":
        codes = _untiled(codes, weight.bits)[:N, :K]
        if weight.bits == 8:
            codes = codes.astype(np.int16) - 128
        scales = _by_row(scales)[:N, : K // weight.group]
        mins = None if mins is None else _by_row(mins)[:N, : K // weight.group]
    if weight.layout == "planar":
        codes, scales = _unpacked(codes, weight.bits, weight.plane), scales.T
        mins = None if mins is None else mins.T
    numbers = codes.astype(np.float32) if weight.table is None else np.asarray(weight.table, np.float32)[codes]
    values = (numbers - np.float32(weight.zero)).reshape(N, K // weight.group, weight.group)
    values *= scales[..., None]
    if mins is not None:
        values -= mins[..., None]
    values = values.reshape(N, K)
    if weight.permutation is None:
        return values
    ordered = np.empty_like(values)
    ordered[:, np.asarray(weight.permutation)] = values
    return ordered


def _flat(factors: Any, supers: Any) -> _Floats:
    """Scales or mins as float32; integers times the float of their supergroup, groups on the last axis but one then."""
    values = np.asarray(factors).astype(np.float32)
    if supers is None:
        return values
    return values * np.repeat(np.asarray(supers), values.shape[-2] // supers.shape[-2], axis=-2)


def _by_row(factors: _Floats) -> _Floats:
    """Factors `[N, K/g]`, filled up to whole tiles and blocks, from `[N/32, K/g, 32]`."""
    return factors.swapaxes(1, 2).reshape(-1, factors.shape[1])


def _untiled(tiles: _Array, bits: int) -> _Array:
    """Codes `[N, K]`, filled up likewise, from tiles (`native/tiles.py`)."""
    count, blocks, _ = tiles.shape
    words = tiles.reshape(count, blocks, bits, TILE, 4)
    codes = np.zeros((count, blocks, STEPS, TILE, 4), np.uint8)
    for field in tile_fields(bits):
        part = words[:, :, field.word] >> field.bit & (2**field.width - 1)
        codes[:, :, field.step] |= part << field.shift
    return codes.transpose(0, 3, 1, 2, 4).reshape(count * TILE, blocks * TILE_BLOCK)


def _unpacked(words: _Array, bits: int, plane: int) -> _Array:
    """Codes `[N, K]` from `pack_planar`'s words."""
    fields = np.arange(0, 16, bits, dtype=np.uint16)[:, None]
    codes = words.reshape(len(words), -1, 1, plane) >> fields & np.uint16(2**bits - 1)
    return codes.reshape(len(words), -1)
