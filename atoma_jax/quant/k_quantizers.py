"""From f32 to ggml's K blocks, and to IQ4_NL: one function a type, from `[blocks, elements]` to `[blocks, bytes]`.

Owns the bit layouts, the reverse of `ggml_blocks.py`, and how scales of groups are themselves quantized; finding them
is `scale_search.py`'s. Bytes equal ggml's without an importance matrix. The simpler types are `quantizers.py`'s.
"""

from typing import Any, TypeAlias

import numpy as np

from atoma_jax.quant.ggml_iq_blocks import IQ4_TABLE
from atoma_jax.quant.scale_search import (
    SymmetricFit,
    affine_fit,
    codebook_fit,
    refined_fit,
    sum_in_order,
    symmetric_fit,
)

_Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
_Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

_F = np.float32
_BLOCK = 256


def columns(x: _Floats, group: int) -> _Floats:
    """[blocks, elements] to [group, blocks·groups]."""
    return np.ascontiguousarray(x.reshape(-1, group).T)


def half_bytes(values: _Floats) -> _Bytes:
    """One f16 a block, as [blocks, 2] bytes."""
    return values.astype("<f2")[:, None].view(np.uint8)


def _widened(values: _Floats) -> _Floats:
    """What an f16 keeps."""
    return values.astype(np.float16).astype(np.float32)


def _codes(x: _Floats, found: _Floats, scales: _Floats, mins: _Floats | None, lowest: int, highest: int) -> _Bytes:
    """[blocks, 256] codes less `lowest` for the scales that a file keeps. Where those are 0, `found` stays, as in ggml.

    Args:
        x: [group, groups of all blocks].
        found: the search's codes, as x.
        scales: [groups of all blocks].
        mins: as scales.
        lowest: the smallest code.
        highest: the largest.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint((x if mins is None else x + mins) / scales)
    np.clip(codes, lowest, highest, out=codes)
    codes -= lowest
    codes = np.where(scales == 0, found, codes)
    return np.ascontiguousarray(codes.astype(np.uint8).T).reshape(-1, _BLOCK)


def two_bits(codes: _Bytes) -> _Bytes:
    """[blocks, 256] codes below 4 to [blocks, 64]: bits 2j and 2j + 1 of a byte are from the j-th 32 of each half."""
    quarters = codes.reshape(-1, 2, 4, 32)
    packed = quarters[:, :, 0].copy()
    for j in range(1, 4):
        packed |= np.left_shift(quarters[:, :, j], 2 * j)
    return packed.reshape(-1, 64)


def nibbles(low: _Bytes, high: _Bytes) -> _Bytes:
    """The lower four bits of each; a fifth bit is left out."""
    return np.bitwise_or(np.left_shift(high, 4), np.bitwise_and(low, 15))


def _integers(by_block: _Floats, largest: _Floats, top: int) -> _Bytes:
    """Values of groups [blocks, groups] as integers, so that the largest of a block is `top`."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.where(largest > 0, _F(top) / largest, _F(0))
        numbers = np.rint(inverse[:, None] * by_block)
    return np.fmin(np.fmax(numbers, 0), top).astype(np.uint8)  # NaN where the inverse of a subnormal is infinite


def q2_k(blocks: _Floats) -> _Bytes:
    """Sixteen groups of four-bit scales and mins."""
    x = columns(blocks, 16)
    fit = affine_fit(x, np.abs(x), top=3, first=-0.5, step=0.1, tries=16, absolute=True)

    def four_bits(values: _Floats) -> tuple[_Bytes, _Floats]:
        """Integers [blocks, 16], and the super [blocks]."""
        by_block = values.reshape(-1, 16)
        largest = np.maximum(by_block.max(axis=1), 0)
        return _integers(by_block, largest, 15), largest / _F(15)

    scales, super_scale = four_bits(fit.scales)
    mins, super_min = four_bits(fit.mins)
    kept_scales = _widened(super_scale)[:, None] * scales
    kept_mins = _widened(super_min)[:, None] * mins
    codes = _codes(x, fit.codes, kept_scales.reshape(-1), kept_mins.reshape(-1), 0, 3)
    parts = [nibbles(scales, mins), two_bits(codes), half_bytes(super_scale), half_bytes(super_min)]
    return np.concatenate(parts, axis=1)


def q3_k(blocks: _Floats) -> _Bytes:
    """Sixteen groups of signed six-bit scales."""
    x = columns(blocks, 16)
    fit = refined_fit(x, 4)
    by_block, peak = _scale_peaks(fit)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = _F(-32) / peak
        numbers = np.clip(np.rint(inverse[:, None] * by_block), -32, 31)
        super_scale = np.where(peak != 0, _F(1) / inverse, _F(0))
    numbers = np.where(peak[:, None] != 0, numbers, _F(-32))  # stored as 0, as ggml leaves them
    kept = _widened(super_scale)[:, None] * numbers
    codes = _codes(x, fit.codes, kept.reshape(-1), None, -4, 3)

    stored = (numbers + 32).astype(np.uint8)
    low = nibbles(stored[:, :8], stored[:, 8:])
    high = np.zeros((len(stored), 4), np.uint8)
    for i in range(4):
        high |= np.left_shift(stored[:, 4 * i : 4 * i + 4] >> 4, 2 * i)
    mask = np.packbits((codes > 3).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    return np.concatenate([mask, two_bits(np.bitwise_and(codes, 3)), low, high, half_bytes(super_scale)], axis=1)


def _scale_peaks(fit: SymmetricFit) -> tuple[_Floats, _Floats]:
    """Scales [blocks, 16], and of each block the first that is largest by magnitude."""
    by_block = fit.scales.reshape(-1, 16)
    first = np.abs(by_block).argmax(axis=1)
    return by_block, np.take_along_axis(by_block, first[:, None], axis=1)[:, 0]


def _six_bit_blocks(blocks: _Floats, top: int, first: float, tries: int) -> tuple[_Bytes, _Bytes]:
    """What Q4_K and Q5_K share: the 16 bytes of factors, and codes [blocks, 256]."""
    x = columns(blocks, 32)
    spread = np.sqrt(sum_in_order(x * x) / _F(32))
    fit = affine_fit(x, spread + np.abs(x), top=top, first=first, step=0.1, tries=tries)

    def six_bits(values: _Floats) -> tuple[_Bytes, _Floats]:
        """Integers [blocks, 8], and the super [blocks]."""
        by_block = values.reshape(-1, 8)
        largest = np.maximum(by_block.max(axis=1), 0)
        return _integers(by_block, largest, 63), largest / _F(63)

    scales, super_scale = six_bits(fit.scales)
    mins, super_min = six_bits(fit.mins)
    kept_scales = _widened(super_scale)[:, None] * scales
    kept_mins = _widened(super_min)[:, None] * mins
    codes = _codes(x, fit.codes, kept_scales.reshape(-1), kept_mins.reshape(-1), 0, top)
    low_scales = scales[:, :4] | np.left_shift(scales[:, 4:] >> 4, 6)
    low_mins = mins[:, :4] | np.left_shift(mins[:, 4:] >> 4, 6)
    high = nibbles(scales[:, 4:], mins[:, 4:])
    factors = [half_bytes(super_scale), half_bytes(super_min), low_scales, low_mins, high]
    return np.concatenate(factors, axis=1), codes


def _nibble_pairs(codes: _Bytes) -> _Bytes:
    """[blocks, 256] codes to [blocks, 128]: the low nibbles of 32 bytes are one group, the high ones the next."""
    pairs = codes.reshape(-1, 4, 2, 32)
    return nibbles(pairs[:, :, 0], pairs[:, :, 1]).reshape(-1, 128)


def q4_k(blocks: _Floats) -> _Bytes:
    """Eight groups of six-bit scales and mins."""
    factors, codes = _six_bit_blocks(blocks, top=15, first=-1.0, tries=21)
    return np.concatenate([factors, _nibble_pairs(codes)], axis=1)


def q5_k(blocks: _Floats) -> _Bytes:
    """As Q4_K, with a plane of fifth bits."""
    factors, codes = _six_bit_blocks(blocks, top=31, first=-0.5, tries=16)
    plane = np.packbits((codes > 15).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    return np.concatenate([factors, plane, _nibble_pairs(codes)], axis=1)


def q6_k(blocks: _Floats) -> _Bytes:
    """Sixteen groups of eight-bit scales."""
    x = columns(blocks, 16)
    fit = symmetric_fit(x, 32)
    by_block, peak = _scale_peaks(fit)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = _F(-128) / peak
        numbers = np.minimum(np.rint(inverse[:, None] * by_block), 127)
        super_scale = _F(1) / inverse
    nothing = np.abs(peak) < _F(1e-15)
    numbers = np.where(nothing[:, None], _F(0), numbers)
    super_scale = np.where(nothing, _F(0), super_scale)
    kept = _widened(super_scale)[:, None] * numbers
    codes = _codes(x, fit.codes, kept.reshape(-1), None, -32, 31)
    codes[nothing] = 0
    halves = codes.reshape(-1, 2, 4, 32)
    low = nibbles(halves[:, :, :2], halves[:, :, 2:])  # [blocks, 2, 2, 32]
    scales = numbers.astype(np.int8).view(np.uint8)
    parts = [low.reshape(-1, 128), two_bits(np.right_shift(codes, 4)), scales, half_bytes(super_scale)]
    return np.concatenate(parts, axis=1)


def iq4_nl(blocks: _Floats) -> _Bytes:
    """One f16 scale for 32 elements, and codes that stand for sixteen numbers, closer around zero."""
    fit = codebook_fit(columns(blocks, 32), IQ4_TABLE, tries=7)
    codes = fit.codes.astype(np.uint8).T
    return np.concatenate([half_bytes(fit.scales), nibbles(codes[:, :16], codes[:, 16:])], axis=1)
