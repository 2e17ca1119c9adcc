"""Codes of a few bits packed into wider words, as checkpoints in HF layout store them, taken apart with numpy.

Owns the order of fields in a word. Which tensor is packed how, scales and zero points are the readers' of `loading`.
Functions take any rows of the logical matrix [N, K] and read no others; results own their memory.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int32, UInt8

Rows: TypeAlias = np.ndarray[Any, np.dtype[np.int64]] | slice  # indices, or neighbours without a step

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the field of a word that holds its first, second, … column (AutoAWQ, "gemm")


def natural_order(bits: int) -> tuple[int, ...]:
    """The fields of a 32-bit word, the lowest bits first."""
    return tuple(range(32 // bits))


def unpack_rows(words: Int32[np.ndarray, "n words"], bits: int) -> UInt8[np.ndarray, "n codes"]:
    """Rows whose neighbours along K share a word, the lowest bits first; 2, 4 or 8 bits. Takes rows that are read."""
    packed = np.array(words, "<i4", order="C").view(np.uint8)  # little-endian: the lowest bits are in the first byte
    if bits == 8:
        return packed
    per_byte = 8 // bits
    codes = np.empty((*packed.shape, per_byte), np.uint8)
    for field in range(per_byte):
        codes[..., field] = (packed >> np.uint8(field * bits)) & np.uint8(2**bits - 1)
    return codes.reshape(len(packed), packed.shape[1] * per_byte)


def unpack_columns(
    words: Int32[np.ndarray, "K words"], rows: Rows, bits: int, order: Sequence[int], add: int = 0
) -> UInt8[np.ndarray, "n K"]:
    """Rows of a matrix that is stored transposed and whose neighbours along N share a word.

    Args:
        words: `[K, ceil(N · bits / 32)]`.
        rows: of the matrix: columns of what is stored.
        bits: of a code.
        order: the field of a word that holds its first, second, … column.
        add: to each word, modulo 2^32, before it is taken apart: carries go from field to field.
    """
    per_word = 32 // bits
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(words.shape[1] * per_word)
        stop = max(start, stop)
        first = start // per_word
        packed = words[:, first : -(-stop // per_word)]
        chosen: Any = slice(start - first * per_word, stop - first * per_word)
    else:
        places, inverse = np.unique(rows // per_word, return_inverse=True)
        packed = words[:, places]
        chosen = inverse * per_word + rows % per_word
    by_word = np.array(packed.T, "<i4", order="C").view(np.uint32)  # [words, K]
    by_word += np.uint32(add)
    codes = np.empty((by_word.shape[0], per_word, by_word.shape[1]), np.uint8)
    for column, field in enumerate(order):
        codes[:, column] = (by_word >> np.uint32(field * bits)) & np.uint32(2**bits - 1)
    return codes.reshape(by_word.shape[0] * per_word, by_word.shape[1])[chosen]


def unpack_quarters(packed: UInt8[np.ndarray, "quarter K"], rows: Rows) -> UInt8[np.ndarray, "n K"]:
    """Rows of two-bit codes whose byte row r holds rows r, r + N/4, r + N/2 and r + 3N/4, the lowest bits first.

    The layout of BitNet checkpoints (transformers, integrations/bitnet.py).
    """
    quarter = packed.shape[0]
    indices = np.arange(4 * quarter)[rows]
    fields = (indices // quarter * 2).astype(np.uint8)
    return (packed[indices % quarter] >> fields[:, None]) & np.uint8(3)
