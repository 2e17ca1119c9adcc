"""The bit layouts of ggml's ternary and one-bit blocks, from bytes to codes of two bits and scales: d · (q − 1).

TQ1_0 and TQ2_0 hold −1, 0 and 1. Q2_0 holds −1 to 2, Q1_0 −1 and 1.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, arithmetic: ggml-quants.c beside it.
"""

from typing import Any, TypeAlias

import numpy as np

from atoma_jax.quant.ggml_blocks import Parts, half, quarters

_Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]


def tq1_0(blocks: _Bytes) -> Parts:
    """Five ternary digits a byte in 32, then 16 bytes, then four digits a byte in 4: 160 + 80 + 16 elements.

    A byte over 256 is a fraction whose ternary digits are the elements: the first is ⌊3·byte / 256⌋, at least 1 from 86
    on and 2 from 171 on, and three times the byte, modulo 256, begins with the next.
    """
    codes = np.empty((*blocks.shape[:-1], 256), np.uint8)
    start = 0
    for first, size, digits in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        fractions = blocks[..., first : first + size].copy()
        for _ in range(digits):
            digit = codes[..., start : start + size]
            np.greater_equal(fractions, 86, out=digit, casting="unsafe")
            digit += (fractions >= 171).view(np.uint8)
            fractions *= 3  # modulo 256
            start += size
    return Parts(codes, half(blocks, 52))


def tq2_0(blocks: _Bytes) -> Parts:
    """Two bits an element, in the order of Q2_K."""
    return Parts(quarters(blocks[..., 0:64].reshape(*blocks.shape[:-1], 2, 32)), half(blocks, 64))


def q1_0(blocks: _Bytes) -> Parts:
    """A bit an element, neighbours in neighbouring bits: codes 0 and 2."""
    codes = np.unpackbits(blocks[..., 2:18], axis=-1, bitorder="little")
    codes <<= 1
    return Parts(codes, half(blocks, 0))


def q2_0(blocks: _Bytes) -> Parts:
    """Two bits an element, neighbours in neighbouring bits."""
    packed = np.ascontiguousarray(blocks[..., 2:18])
    codes = packed.astype("<u4")  # four bytes of codes for one of the file
    codes |= codes << 12
    codes &= 0x000F000F
    codes |= codes << 6
    codes &= 0x03030303
    return Parts(codes.view(np.uint8), half(blocks, 0))
