"""Inside kernels: words of the planar layout become numbers in bfloat16, or bytes. Owns the bit tricks and nothing of a
product.

A word is as wide as the bfloat16 it becomes, so a tile of words has the register layout of the operand. 0x4300 is 128
in bfloat16, whose last seven bits count ones: `0x4300 | code` is 128 + code, exactly. As one register holds the words
of two neighbours along K, a plane costs a shift, one three-input logic operation (lop3) and a subtraction for two
weights. As bytes it costs half as many operations: one register holds four.

Inline assembly says what the compiler does not find; it does not run without a GPU, where the same is said in `jnp`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, BFloat16, Int8, UInt16

_MAGIC = 0x4300  # 128 in bfloat16
_PAIR = 0x00010001  # one mask for both words of a register
_AND_OR = 0xEA  # lop3: (a & b) | c
_NOT_AND_OR = 0xAE  # lop3: (~a & b) | c
_BYTES_OF_HALF = 0x6420, 0x7531  # prmt: the low bytes of four halves of two registers, or the high ones


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


def unpack_bytes(
    words: UInt16[Array, "rows P"], *, bits: int, table: tuple[int, ...] | None, assembly: bool
) -> list[Int8[Array, "rows P"]]:
    """The numbers of a tile of words as signed bytes, plane by plane: codes, those of eight bits less 128; or what the
    table has for them.

    Arguments as of `unpack`.
    """
    planes = range(16 // bits)
    if assembly:
        return [_plane_of_bytes(words, i, bits, table) for i in planes]
    codes = [words >> np.uint16(bits * i) & np.uint16(2**bits - 1) for i in planes]
    if table is not None:
        return [_from_table(code, bits, table).astype(jnp.int8) for code in codes]
    return [(code.astype(jnp.int32) - (128 if bits == 8 else 0)).astype(jnp.int8) for code in codes]


def _plane_of_bytes(words: Array, i: int, bits: int, table: tuple[int, ...] | None) -> Array:
    """Two registers hold four words, one holds the bytes of the half that plane i lies in. What planes have in common,
    like these, the assembler makes once.
    """
    half, place = divmod(i, 8 // bits)
    lines = [f".reg .b32 t; prmt.b32 t, $1, $2, {_BYTES_OF_HALF[half]:#x};"]
    if table is not None:
        values = np.asarray(table, np.int8)
        lines += [".reg .b32 c, d;", *_lookup(values, "t", "c", "d"), f"prmt.b32 $0, c, d, {_BYTES_OF_HALF[place]:#x};"]
    elif bits == 8:
        lines.append("xor.b32 $0, t, 0x80808080;")
    else:
        lines += [f"shr.u32 t, t, {bits * place};"] if place else []
        lines.append(f"and.b32 $0, t, {(2**bits - 1) * 0x01010101:#x};")
    return _assembly(f"{{ {' '.join(lines)} }}", words, "=r,r,r", jnp.int8, pack=4)


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
    """int32 `[rows, P]`: what the four codes of each word stand for, plus 128, a byte each."""
    values = (np.asarray(table, np.int16) + 128).astype(np.uint8)
    return _assembly(f"{{ {' '.join(_lookup(values, '$2', '$0', '$1'))} }}", words, "=r,=r,r", jnp.int32)


def _lookup(values: np.ndarray, codes: str, first: str, second: str) -> list[str]:
    """Assembly for what the eight codes of a register stand for: a byte each, four in `first` and four in `second`. The
    codes are read before anything is written, and not afterwards.

    prmt picks four bytes of eight by the low three bits of four nibbles. A table of sixteen takes two, and a third
    picks between their results by the fourth bit.
    """
    assert values.shape == (16,), values
    return [
        ".reg .b32 s, h, a, b;",
        *(f".reg .b32 t{i}; mov.b32 t{i}, {int(part):#x};" for i, part in enumerate(values.view("<u4"))),
        f"and.b32 s, {codes}, 0x77777777; and.b32 h, {codes}, 0x88888888; shr.u32 h, h, 1; or.b32 h, h, 0x32103210;",
        f"prmt.b32 a, t0, t1, s; prmt.b32 b, t2, t3, s; prmt.b32 {first}, a, b, h;",
        "shr.u32 s, s, 16; shr.u32 h, h, 16;",
        f"prmt.b32 a, t0, t1, s; prmt.b32 b, t2, t3, s; prmt.b32 {second}, a, b, h;",
    ]


def _bytes_of_plane(numbers: Array, i: int) -> Array:
    """int16 `[rows, P]` whose low bytes are byte i of each; high bytes are anything."""
    selector = i | (4 + i) << 8  # in the low byte of either half
    return _assembly(f"prmt.b32 $0, $1, $2, {selector:#x};", numbers, "=r,r,r", jnp.int16)


def _assembly(text: str, argument: Array, constraints: str, dtype: Any, *, pack: int = 2) -> Array:
    """Runs assembly over neighbours, two or more at once."""
    shape = jax.ShapeDtypeStruct(argument.shape, dtype)
    [found] = plt.elementwise_inline_asm(
        text, args=[argument], constraints=constraints, pack=pack, result_shape_dtypes=[shape]
    )
    return found
