"""The bit layouts of ggml's IQ blocks: one function a type, from bytes to codes and scales, and what codes stand for.

IQ4 indexes a table of sixteen numbers. The others name groups of four or eight magnitudes by an index into a grid
(`ggml_grids.py`) and their signs apart; here each element gets a code of its own, its magnitude in the low bits and
`SIGN` for a negative one, so that they have tables of sixteen numbers as well. Scales are integers, mostly 2s + 1; the
f16 of a block is divided by 4 or 8 to make them and the tables whole, which is exact.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, arithmetic: ggml-quants.c beside it.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from atoma_jax.quant.ggml_blocks import Parts, fields, half, nibbles
from atoma_jax.quant.ggml_grids import SIGN, delta_grid, even_signs, grid, signs

_Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
_Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int8]]
_Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
_Words: TypeAlias = np.ndarray[Any, np.dtype[Any]]  # unsigned


def _signed(magnitudes: Sequence[int]) -> tuple[int, ...]:
    """A table whose upper half are the lower half's negatives; codes that no grid holds stand for 0."""
    lower = (*magnitudes, *[0] * (SIGN - len(magnitudes)))
    return (*lower, *(-number for number in lower))


IQ1_TABLE = (-7, 1, 9, 0, 0, 0, 0, 0, -9, -1, 7, 0, 0, 0, 0, 0)  # 8g ± 1, g in (−1, 0, 1)
IQ2_TABLE = _signed((8, 25, 43))
IQ3_XXS_TABLE = _signed((4, 12, 20, 28, 36, 44, 52, 62))
IQ3_S_TABLE = _signed((1, 3, 5, 7, 9, 11, 13, 15))
IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _words(blocks: _Bytes, start: int, stop: int, dtype: str) -> _Words:
    """Bytes of every block as little-endian words, aligned."""
    return np.ascontiguousarray(blocks[..., start:stop]).view(dtype)


def _codes(magnitudes: _Words, negative: _Words) -> _Bytes:
    """Entries of a grid with their signs, as bytes. Owns `magnitudes`."""
    codes = magnitudes.view(negative.dtype)  # two entries of four elements for one of eight signs
    codes |= negative
    return codes.view(np.uint8)


def _odd(scales: _Words) -> _Integers:
    """2s + 1."""
    return (2 * scales.astype(np.int8)) + np.int8(1)


def _divided(supers: _Floats, divisor: int) -> _Floats:
    """In place."""
    supers /= divisor
    return supers


def _nibble_pairs(packed: _Bytes) -> _Bytes:
    """[…, n] bytes to […, 2n] nibbles, low before high within each byte."""
    return fields(packed, (0, 4), 15).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def _seven_bit_fields(words: _Words) -> _Words:
    """The four sign indices in the low 28 bits of each u32."""
    return fields(words, (0, 7, 14, 21), 127)


def iq2_xxs(blocks: _Bytes) -> Parts:
    """d/8 · (2s + 1) · ±grid: for each 32 elements four bytes of indices, then four times seven signs below s."""
    words = _words(blocks, 2, 66, "<u4").reshape(*blocks.shape[:-1], 8, 2)
    index = np.ascontiguousarray(words[..., 0]).view(np.uint8).reshape(*blocks.shape[:-1], 8, 4)
    signs_and_scale = words[..., 1]
    negative = even_signs()[_seven_bit_fields(signs_and_scale)]
    return Parts(_codes(grid("iq2_xxs")[index], negative), _odd(signs_and_scale >> 28), _divided(half(blocks, 0), 8))


def iq2_xs(blocks: _Bytes) -> Parts:
    """d/8 · (2s + 1) · ±grid: for each 8 elements a u16 of nine bits of index and seven signs."""
    words = _words(blocks, 2, 66, "<u2")
    codes = _codes(grid("iq2_xs")[words & 511], even_signs()[words >> 9])
    return Parts(codes, _odd(_nibble_pairs(blocks[..., 66:74])), _divided(half(blocks, 0), 8))


def iq2_s(blocks: _Bytes) -> Parts:
    """d/8 · (2s + 1) · ±grid: ten bits of index, of which the upper two lie apart, and eight signs."""
    index = fields(blocks[..., 66:74], (0, 2, 4, 6), 3).reshape(*blocks.shape[:-1], 32).astype(np.uint16)
    index <<= 8
    index |= blocks[..., 2:34]
    codes = _codes(grid("iq2_s")[index], signs()[blocks[..., 34:66]])
    return Parts(codes, _odd(_nibble_pairs(blocks[..., 74:82])), _divided(half(blocks, 0), 8))


def iq3_xxs(blocks: _Bytes) -> Parts:
    """d/4 · (2s + 1) · ±grid: a byte of index for each 4 elements; signs and s as IQ2_XXS."""
    signs_and_scale = _words(blocks, 66, 98, "<u4")
    negative = even_signs()[_seven_bit_fields(signs_and_scale).reshape(*blocks.shape[:-1], 32)]
    codes = _codes(grid("iq3_xxs")[blocks[..., 2:66]], negative)
    return Parts(codes, _odd(signs_and_scale >> 28), _divided(half(blocks, 0), 4))


def iq3_s(blocks: _Bytes) -> Parts:
    """d · (2s + 1) · ±grid: nine bits of index, of which the upper one lies apart, and eight signs."""
    index = np.unpackbits(blocks[..., 66:74], axis=-1, bitorder="little").astype(np.uint16)
    index <<= 8
    index |= blocks[..., 2:66]
    codes = _codes(grid("iq3_s")[index], signs()[blocks[..., 74:106]])
    return Parts(codes, _odd(_nibble_pairs(blocks[..., 106:110])), half(blocks, 0))


def iq1_s(blocks: _Bytes) -> Parts:
    """d/8 · (2s + 1) · (8·grid ± 1): for each 32 elements a u16 of four times three upper bits of index, s and sign."""
    words = _words(blocks, 34, 50, "<u2")
    upper = fields(words, (0, 3, 6, 9), 7)  # [N, blocks, 8, 4]
    upper |= (words >> 15 << 3)[..., None]
    return Parts(_delta_codes(blocks[..., 2:34], upper), _odd(words >> 12 & 7), _divided(half(blocks, 0), 8))


def iq1_m(blocks: _Bytes) -> Parts:
    """As IQ1_S, with s for each 16 elements and a sign for each 8; d is in the upper nibbles of four u16 of scales."""
    upper = _nibble_pairs(blocks[..., 32:48]).astype(np.uint16)  # the sign is above the three bits of index
    words = _words(blocks, 48, 56, "<u2")
    d = words[..., 0] >> 12 | words[..., 1] >> 8 & 0xF0 | words[..., 2] >> 4 & 0xF00 | words[..., 3] & 0xF000
    scales = _odd(fields(words, (0, 3, 6, 9), 7))
    return Parts(_delta_codes(blocks[..., 0:32], upper), scales, _divided(d.view(np.float16).astype(np.float32), 8))


def _delta_codes(low: _Bytes, upper: _Words) -> _Bytes:
    """Codes of IQ1: of each index into `delta_grid`, the low byte and the upper four bits."""
    index = upper.reshape(low.shape)
    index <<= 8
    index |= low
    return delta_grid()[index].view(np.uint8)


def iq4_nl(blocks: _Bytes) -> Parts:
    """d · table[q]."""
    return Parts(nibbles(blocks[..., 2:18]), half(blocks, 0))


def iq4_xs(blocks: _Bytes) -> Parts:
    """d · (s − 32) · table[q]: a u16 of the upper two bits of eight scales, four bytes of their lower four."""
    upper = fields(_words(blocks, 2, 4, "<u2")[..., 0], range(0, 16, 2), 3).astype(np.uint8)
    scales = (_nibble_pairs(blocks[..., 4:8]) | upper << 4).view(np.int8) - np.int8(32)
    packed = blocks[..., 8:136].reshape(*blocks.shape[:-1], 8, 16)
    return Parts(nibbles(packed), scales, half(blocks, 0))
