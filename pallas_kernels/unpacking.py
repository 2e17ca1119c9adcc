"""Inside kernels: words of the planar layout become numbers in bfloat16. Owns the bit tricks and nothing of a product.

A word is as wide as the bfloat16 it becomes, so a tile of words has the register layout of the operand. 0x4300 is 128 in
bfloat16, whose last seven bits count ones: `0x4300 | code` is 128 + code, exactly. As one register holds the words of
two neighbours along K, a plane costs a shift, one three-input logic operation (lop3) and one subtraction for two weights.

Inline assembly says what the compiler does not find; it does not run without a GPU, where the same is said in `jnp`.
"""

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
        table: of four-bit codes; whole numbers of at most eight significant bits.
        assembly: compiled for a GPU; otherwise plain `jnp`.
    """
    if table is not None:
        return _table_assembly(words, table) if assembly else _table(words, bits, table)
    plane = _plane_assembly if assembly else _plane
    return [plane(words, i, bits, zero) for i in range(16 // bits)]


def _plane(words: Array, i: int, bits: int, zero: int) -> Array:
    codes = (words >> np.uint16(bits * i)) & np.uint16(2**bits - 1)
    if bits < 8:
        return _as_bfloat16(codes | np.uint16(_MAGIC)) - jnp.bfloat16(128 + zero)
    # Seven bits fit the trick; the eighth is 128 or 256 less: (128 + low) − (256 − high) = low + high − 128.
    low = _as_bfloat16((codes & np.uint16(127)) | np.uint16(_MAGIC))
    high = _as_bfloat16((~codes & np.uint16(128)) | np.uint16(_MAGIC))
    return low - high + jnp.bfloat16(128 - zero) if zero != 128 else low - high


def _plane_assembly(words: Array, i: int, bits: int, zero: int) -> Array:
    def masked(mask: int, truth: int) -> Array:
        shift = bits * i
        logic = f"{mask * _PAIR:#x}, {_MAGIC * _PAIR:#x}, {truth:#x};"
        text = f"lop3.b32 $0, $1, {logic}"
        if shift:
            text = f"{{ .reg .b32 t; shr.u32 t, $1, {shift}; lop3.b32 $0, t, {logic} }}"
        return _assembly(text, words, 1)[0]

    if bits < 8:
        return masked(2**bits - 1, _AND_OR) - jnp.bfloat16(128 + zero)
    number = masked(127, _AND_OR) - masked(128, _NOT_AND_OR)
    return number + jnp.bfloat16(128 - zero) if zero != 128 else number


def _table(words: Array, bits: int, table: tuple[int, ...]) -> list[Array]:
    planes: list[Array] = []
    for i in range(16 // bits):
        codes = (words >> np.uint16(bits * i)) & np.uint16(2**bits - 1)
        number = jnp.full(words.shape, table[0], jnp.bfloat16)
        for code, value in enumerate(table[1:], 1):  # a kernel may not close over an array
            number = jnp.where(codes == np.uint16(code), jnp.bfloat16(value), number)
        planes.append(number)
    return planes


def _table_assembly(words: Array, table: tuple[int, ...]) -> list[Array]:
    """Byte permutations look four codes of a word up at once, in each half of a table of eight registers.

    prmt picks four bytes of eight by the low three bits of four nibbles; which half of the table a code means, its
    fourth bit, picks in the same way between the two results. Low and high bytes of the bfloat16s are looked up apart,
    then bytes of two words are put together by plane.
    """
    assert len(table) == 16, table
    bits = np.asarray(table, np.float32).view(np.uint32) >> 16  # exact in bfloat16: its upper half
    low, high = (bits & 0xFF).astype(np.uint8).view("<u4"), (bits >> 8).astype(np.uint8).view("<u4")
    lines = [
        ".reg .b32 s0, s1, h0, h1, a, b, l0, u0, l1, u1, p0, p1, q0, q1;",
        *(f".reg .b32 t{i}; mov.b32 t{i}, {int(value):#x};" for i, value in enumerate((*low, *high))),
        "and.b32 s0, $4, 0x77777777; shr.u32 s1, s0, 16;",
        "and.b32 h0, $4, 0x88888888; shr.u32 h0, h0, 1; or.b32 h0, h0, 0x32103210; shr.u32 h1, h0, 16;",
    ]
    for word in (0, 1):
        for out, first in ((f"l{word}", 0), (f"u{word}", 4)):
            lines += [
                f"prmt.b32 a, t{first}, t{first + 1}, s{word}; prmt.b32 b, t{first + 2}, t{first + 3}, s{word};",
                f"prmt.b32 {out}, a, b, h{word};",
            ]
    lines += [
        "prmt.b32 p0, l0, u0, 0x5140; prmt.b32 p1, l1, u1, 0x5140;",  # planes 0 and 1 of either word
        "prmt.b32 q0, l0, u0, 0x7362; prmt.b32 q1, l1, u1, 0x7362;",  # planes 2 and 3
        "prmt.b32 $0, p0, p1, 0x5410; prmt.b32 $1, p0, p1, 0x7632;",
        "prmt.b32 $2, q0, q1, 0x5410; prmt.b32 $3, q0, q1, 0x7632;",
    ]
    return _assembly(f"{{ {' '.join(lines)} }}", words, 4)


def _assembly(text: str, words: Array, outputs: int) -> list[Array]:
    """Runs assembly over registers of two words each."""
    shape = jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)
    # An output may be written before the input was read for the last time where there are several.
    out = "=r" if outputs == 1 else "=&r"
    constraints = ",".join([*[out] * outputs, "r"])
    found = plt.elementwise_inline_asm(
        text, args=[words], constraints=constraints, pack=2, result_shape_dtypes=[shape] * outputs
    )
    return list(found)


def _as_bfloat16(words: Array) -> Array:
    return lax.bitcast_convert_type(words, jnp.bfloat16)
