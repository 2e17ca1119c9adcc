"""Inside kernels: words of the planar layout become numbers in bfloat16. Owns the bit tricks and nothing of a product.

A word is as wide as the bfloat16 it becomes, so a tile of words has the register layout of the operand. 0x4300 is 128
in bfloat16, whose last seven bits count ones: `0x4300 | code` is 128 + code, exactly. As one register holds the words
of two neighbours along K, a plane costs a shift, one three-input logic operation (lop3) and a subtraction for two
weights.

Inline assembly says what the compiler does not find; it does not run without a GPU, where the same is said in `jnp`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, BFloat16, UInt16

_MAGIC = 0x4300  # 128 in bfloat16
_PAIR = 0x00010001  # one mask for both words of a register
_AND_OR = 0xEA  # lop3: (a & b) | c
_NOT_AND_OR = 0xAE  # lop3: (~a & b) | c


def unpack(
    words: UInt16[Array, "rows P"], *, bits: int, zero: int, table: tuple[int, ...] | None, assembly: bool
) -> list[BFloat16[Array, "rows P"]]:
    """The numbers of a tile of words, plane by plane: code − zero, or `table[code]`. All are exact in bfloat16.

    Args:
        words: of one block along K.
        bits: of a code: 2, 4 or 8.
        zero: subtracted; 0 where there is a table.
        table: of four-bit codes; whole numbers from −128 to 127.
        assembly: compiled for a GPU; otherwise plain `jnp`.
    """
    planes = range(16 // bits)
    if table is None:
        return [_number(words, bits * i, bits, zero, assembly) for i in planes]
    if not assembly:
        return [_from_table(words >> np.uint16(bits * i), bits, table) for i in planes]
    numbers = _looked_up(words, table)
    return [_number(_bytes_of_plane(numbers, i), 0, 8, 128, assembly) for i in planes]


def _number(words: Array, shift: int, bits: int, zero: int, assembly: bool) -> Array:
    """The field of `bits` bits at `shift`, less `zero`."""

    def masked(mask: int, *, inverted: bool = False) -> Array:
        if assembly:
            return _masked_assembly(words, shift, mask, _NOT_AND_OR if inverted else _AND_OR)
        field = (~words if inverted else words) >> np.uint16(shift) & np.uint16(mask)
        return lax.bitcast_convert_type(field | np.uint16(_MAGIC), jnp.bfloat16)

    if bits < 8:
        return masked(2**bits - 1) - jnp.bfloat16(128 + zero)
    # Seven bits fit the trick. The eighth, inverted, adds 128 to 128: (128 + low) − (256 − high) = low + high − 128.
    number = masked(127) - masked(128, inverted=True)
    return number if zero == 128 else number + jnp.bfloat16(128 - zero)


def _masked_assembly(words: Array, shift: int, mask: int, truth: int) -> Array:
    logic = f"{mask * _PAIR:#x}, {_MAGIC * _PAIR:#x}, {truth:#x};"
    text = f"lop3.b32 $0, $1, {logic}"
    if shift:
        text = f"{{ .reg .b32 t; shr.u32 t, $1, {shift}; lop3.b32 $0, t, {logic} }}"
    return _assembly(text, words, "=r,r", jnp.bfloat16)


def _from_table(words: Array, bits: int, table: tuple[int, ...]) -> Array:
    codes = words & np.uint16(2**bits - 1)
    number = jnp.full(words.shape, table[0], jnp.bfloat16)
    for code, value in enumerate(table[1:], 1):  # a kernel may not close over an array
        number = jnp.where(codes == np.uint16(code), jnp.bfloat16(value), number)
    return number


def _looked_up(words: Array, table: tuple[int, ...]) -> Array:
    """int32 `[rows, P]`: what the four codes of each word stand for, plus 128, a byte each.

    prmt picks four bytes of eight by the low three bits of four nibbles. A table of sixteen takes two, and a third
    picks between their results by the fourth bit.
    """
    assert len(table) == 16, table
    parts = (np.asarray(table, np.int16) + 128).astype(np.uint8).view("<u4")
    lines = [
        ".reg .b32 s, h, a, b;",
        *(f".reg .b32 t{i}; mov.b32 t{i}, {int(part):#x};" for i, part in enumerate(parts)),
        "and.b32 s, $2, 0x77777777; and.b32 h, $2, 0x88888888; shr.u32 h, h, 1; or.b32 h, h, 0x32103210;",
        "prmt.b32 a, t0, t1, s; prmt.b32 b, t2, t3, s; prmt.b32 $0, a, b, h;",
        "shr.u32 s, s, 16; shr.u32 h, h, 16;",
        "prmt.b32 a, t0, t1, s; prmt.b32 b, t2, t3, s; prmt.b32 $1, a, b, h;",
    ]
    # The input is read before the first output is written, and not afterwards.
    return _assembly(f"{{ {' '.join(lines)} }}", words, "=r,=r,r", jnp.int32)


def _bytes_of_plane(numbers: Array, i: int) -> Array:
    """int16 `[rows, P]` whose low bytes are byte i of each; high bytes are anything."""
    selector = i | (4 + i) << 8  # in the low byte of either half
    return _assembly(f"prmt.b32 $0, $1, $2, {selector:#x};", numbers, "=r,r,r", jnp.int16)


def _assembly(text: str, argument: Array, constraints: str, dtype: jnp.dtype[Any]) -> Array:
    """Runs assembly over pairs of neighbours."""
    shape = jax.ShapeDtypeStruct(argument.shape, dtype)
    [found] = plt.elementwise_inline_asm(
        text, args=[argument], constraints=constraints, pack=2, result_shape_dtypes=[shape]
    )
    return found
