"""The bit layouts of ggml's legacy and K blocks: one function a type, from bytes to codes, scales and mins.

Beside them what all families of blocks share: `Parts`, and the taking apart of bytes. The other families are
`ggml_iq_blocks.py`, `ggml_fp4_blocks.py` and `ggml_ternary_blocks.py`.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, arithmetic: ggml-quants.c beside it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

_Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
_Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int8]]
_Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
_Words: TypeAlias = np.ndarray[Any, np.dtype[Any]]  # unsigned


class Parts(NamedTuple):
    """What a decoder returns, as in `groups.GroupCodes`; elements and groups of a block may be in axes of their own."""

    codes: _Bytes  # [N, blocks, …] in natural order when flattened
    scales: _Floats | _Integers  # [N, blocks(, groups)]
    scale_supers: _Floats | None = None  # [N, blocks]
    mins: _Floats | _Integers | None = None  # as scales
    min_supers: _Floats | None = None


Decoder: TypeAlias = Callable[[_Bytes], Parts]  # of blocks [N, blocks, bytes]


def half(blocks: _Bytes, offset: int) -> _Floats:
    """The f16 at a byte offset of every block, as f32 [N, blocks]."""
    return blocks[..., offset : offset + 2].view("<f2")[..., 0].astype(np.float32)


def nibbles(packed: _Bytes) -> _Bytes:
    """[…, n] bytes to […, 2, n] codes: all low nibbles come before all high ones."""
    packed = np.ascontiguousarray(packed)  # one strided copy is cheaper than two strided reads
    codes = np.empty((*packed.shape[:-1], 2, packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., 0, :])
    np.right_shift(packed, 4, out=codes[..., 1, :])
    return codes


def quarters(packed: _Bytes) -> _Bytes:
    """[…, n] bytes to […, 4, n] codes of two bits: those in the lowest bits of all bytes come first."""
    packed = np.ascontiguousarray(packed)
    codes = np.empty((*packed.shape[:-1], 4, packed.shape[-1]), np.uint8)
    for quarter in range(4):
        np.right_shift(packed, 2 * quarter, out=codes[..., quarter, :])
    codes &= 3
    return codes


def fields(words: _Words, shifts: Sequence[int], mask: int) -> _Words:
    """[…] unsigned numbers to […, len(shifts)] of their bit fields."""
    shifted = words[..., None] >> np.array(shifts, words.dtype)
    shifted &= mask
    return shifted


def _fifth_bits(blocks: _Bytes, offset: int) -> _Bytes:
    """A little-endian u32 at a byte offset, bit i belonging to element i, as 0 or 16 in [N, blocks, 2, 16]."""
    bits = np.unpackbits(blocks[..., offset : offset + 4], axis=-1, bitorder="little")  # [N, blocks, 32]
    bits <<= 4
    return bits.reshape(*bits.shape[:-1], 2, 16)


def q4_0(blocks: _Bytes) -> Parts:
    """d · (q − 8)."""
    return Parts(nibbles(blocks[..., 2:18]), half(blocks, 0))


def q4_1(blocks: _Bytes) -> Parts:
    """d · q + m."""
    return Parts(nibbles(blocks[..., 4:20]), half(blocks, 0), mins=-half(blocks, 2))


def q5_0(blocks: _Bytes) -> Parts:
    """d · (q − 16), with a plane of fifth bits."""
    codes = nibbles(blocks[..., 6:22])
    codes |= _fifth_bits(blocks, 2)
    return Parts(codes, half(blocks, 0))


def q5_1(blocks: _Bytes) -> Parts:
    """d · q + m, with a plane of fifth bits."""
    codes = nibbles(blocks[..., 8:24])
    codes |= _fifth_bits(blocks, 4)
    return Parts(codes, half(blocks, 0), mins=-half(blocks, 2))


def q8_0(blocks: _Bytes) -> Parts:
    """d · q."""
    return Parts(blocks[..., 2:34] ^ np.uint8(0x80), half(blocks, 0))  # two's complement to offset binary


def q2_k(blocks: _Bytes) -> Parts:
    """d·sc · q − dmin·m for sixteen groups, the four bits of sc and of m in one byte."""
    codes = quarters(blocks[..., 16:80].reshape(*blocks.shape[:-1], 2, 32))
    return Parts(
        codes,
        scales=(blocks[..., 0:16] & 15).view(np.int8),
        scale_supers=half(blocks, 80),
        mins=(blocks[..., 0:16] >> 4).view(np.int8),
        min_supers=half(blocks, 82),
    )


def q3_k(blocks: _Bytes) -> Parts:
    """d·(sc − 32) · (q − 4) for sixteen groups, with a plane of third bits.

    Twelve bytes hold sixteen six-bit scales: the low four bits of scales 0–7 and 8–15 in the nibbles of bytes 0–7, the
    upper two bits of scales i, i + 4, i + 8 and i + 12 in byte 8 + i.
    """
    leading = blocks.shape[:-1]
    codes = quarters(blocks[..., 32:96].reshape(*leading, 2, 32)).reshape(*leading, 8, 32)
    plane = np.ascontiguousarray(blocks[..., 0:32])  # bit g of byte i: third bit of element i of 32 elements g
    for g in range(8):
        codes[..., g, :] |= ((plane >> g) & 1) << 2
    low = nibbles(blocks[..., 96:104]).reshape(*leading, 16)
    upper = quarters(blocks[..., 104:108]).reshape(*leading, 16)
    return Parts(codes, (low | upper << 4).view(np.int8) - np.int8(32), half(blocks, 108))


def _k_factors(blocks: _Bytes) -> dict[str, Any]:
    """Scales and mins [N, blocks, 8] of Q4_K and Q5_K, with their supers, as arguments of `Parts`.

    Twelve bytes hold eight pairs of six-bit integers: groups 0–3 in the low six bits of bytes 0–3 (scales) and 4–7
    (mins); groups 4–7 in the nibbles of bytes 8–11, their upper two bits on top of bytes 0–3 and 4–7.
    """
    low_scales, low_mins, nibbles = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = np.concatenate([low_scales & 63, (nibbles & 15) | (low_scales >> 6) << 4], axis=-1)
    mins = np.concatenate([low_mins & 63, (nibbles >> 4) | (low_mins >> 6) << 4], axis=-1)
    return {
        "scales": scales.view(np.int8),
        "scale_supers": half(blocks, 0),
        "mins": mins.view(np.int8),
        "min_supers": half(blocks, 2),
    }


def q4_k(blocks: _Bytes) -> Parts:
    """d·sc · q − dmin·m for eight groups."""
    packed = blocks[..., 16:144].reshape(*blocks.shape[:-1], 4, 32)
    return Parts(nibbles(packed), **_k_factors(blocks))


def q5_k(blocks: _Bytes) -> Parts:
    """As Q4_K, with a plane of fifth bits for each group."""
    packed = blocks[..., 48:176].reshape(*blocks.shape[:-1], 4, 32)
    codes = nibbles(packed).reshape(*blocks.shape[:-1], 8, 32)
    plane = np.ascontiguousarray(blocks[..., 16:48])  # bit g of byte i: fifth bit of element i of group g
    for g in range(8):
        codes[..., g, :] |= ((plane >> g) & 1) << 4
    return Parts(codes, **_k_factors(blocks))


def q6_k(blocks: _Bytes) -> Parts:
    """d·sc · (q − 32) for sixteen groups."""
    leading = blocks.shape[:-1]
    codes = nibbles(blocks[..., 0:128].reshape(*leading, 2, 64)).reshape(*leading, 2, 4, 32)
    upper = np.ascontiguousarray(blocks[..., 128:192]).reshape(*leading, 2, 32)
    for quarter in range(4):  # two bits a quarter of each half block
        codes[..., quarter, :] |= ((upper >> 2 * quarter) & 3) << 4
    return Parts(codes, blocks[..., 192:208].view(np.int8).copy(), half(blocks, 208))
