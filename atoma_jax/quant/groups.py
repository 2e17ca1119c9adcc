"""Group-quantized numbers, whatever file they come from: what a format says before anything is read, and what a reader
returns. Owns the one formula that all of them share; bit layouts are the other modules of this package.

    value = scale · (number − zero) − min,   number = code, or table[code] where the format has a table

in f32, each operation rounded once. `zero` belongs to a format, scales and mins to groups of neighbours along K.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Num, UInt8

_Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
_Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

F16 = np.dtype(np.float16)
BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
I8 = np.dtype(np.int8)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)

WIDTHS = (2, 3, 4, 5, 6, 8)  # of codes, in bits


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFormat:
    """What is the same for every tensor of a quantized type: enough to plan arrays from a file's header alone.

    Attributes:
        bits: of a code. The planar layout stores codes of three, five or six bits in the next width.
        group: neighbours along K that share one scale.
        zero: subtracted from a code before it is scaled; 0 where there is a table.
        table: the number that each code stands for; None where a code is its own number.
        scale_dtype: the narrowest type that holds scales exactly. int8: they are integers, times one f32 (a "super")
            for each `supergroup`.
        min_dtype: likewise of the mins; None where there are none.
        supergroup: neighbours along K that share a super; None where scales are not integers.
        float_codes: a code is the bits of a float8_e4m3fn; 8 bits, no zero, no table, no mins.
    """

    bits: int  # one of WIDTHS
    group: int
    zero: int = 0
    table: tuple[int, ...] | None = None
    scale_dtype: np.dtype[Any] = F32
    min_dtype: np.dtype[Any] | None = None
    supergroup: int | None = None
    float_codes: bool = False

    def __post_init__(self) -> None:
        assert self.bits in WIDTHS, self
        assert (self.scale_dtype == I8) == (self.supergroup is not None), self
        assert self.supergroup is None or self.supergroup % self.group == 0, self
        assert self.zero == 0 or self.table is None, self
        assert not self.float_codes or (self.bits == 8 and self.table is None and self.min_dtype is None), self

    @property
    def has_mins(self) -> bool:
        """Whether a min is subtracted after scaling."""
        return self.min_dtype is not None

    @property
    def packed_bits(self) -> float:
        """Bits a weight: its code, and its share of scales, mins and their supers."""
        factors = [dtype for dtype in (self.scale_dtype, self.min_dtype) if dtype is not None]
        shares = (8 * dtype.itemsize / self.group for dtype in factors)
        supers = 0 if self.supergroup is None else len(factors) * 8 * F32.itemsize / self.supergroup
        return self.bits + sum(shares) + supers


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """Scales or mins of rows: one f32 a group, or an integer a group times an f32 a supergroup."""

    values: Num[np.ndarray, "N groups"]  # float32; int8 where there are supers
    supers: Float32[np.ndarray, "N supergroups"] | None = None

    @np.errstate(invalid="ignore")  # a damaged super may be infinite
    def flat(self) -> Float32[np.ndarray, "N groups"]:
        """One f32 a group."""
        if self.supers is None:
            return self.values
        repeat = self.values.shape[1] // self.supers.shape[1]
        return self.values.astype(np.float32) * np.repeat(self.supers, repeat, axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class GroupCodes:
    """Decoded rows."""

    codes: UInt8[np.ndarray, "N K"]  # unsigned, natural order along K
    scales: Factors
    mins: Factors | None
    format: GroupFormat

    # A damaged scale may be infinite: infinity × 0 is NaN here as in ggml, and 2^127 × 12 (MXFP4) is infinity.
    @np.errstate(invalid="ignore", over="ignore")
    def values(self) -> Float32[np.ndarray, "N K"]:
        """The exact f32 values. The result owns its memory."""
        kind = self.format
        values: _Floats
        if kind.float_codes:
            values = self.codes.view(FLOAT8).astype(np.float32)
        elif kind.table is not None:
            values = np.asarray(kind.table, np.float32)[self.codes]
        else:
            values = self.codes.astype(np.float32)
            values -= np.float32(kind.zero)
        N, K = values.shape
        by_group = values.reshape(N, K // kind.group, kind.group)
        by_group *= self.scales.flat()[..., None]
        if self.mins is not None:
            by_group -= self.mins.flat()[..., None]
        return values

    def signed(self) -> _Array:
        """The numbers less the zero, as int8 `[N, K]`; codes that are floats stay bits, uint8."""
        kind = self.format
        if kind.float_codes:
            return self.codes
        if kind.table is not None:
            return np.asarray(kind.table, np.int8)[self.codes]
        return (self.codes - np.uint8(kind.zero)).view(np.int8)  # wraps around to the two's complement that is wanted
