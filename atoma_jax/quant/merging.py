"""One format for weights that are kept together: the narrowest that holds the values of several formats exactly.

Layers are stacked and projections are fused, while a file may give each of their tensors a type of its own.
"""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np

from atoma_jax.quant.groups import F32, I8, WIDTHS, Factors, GroupCodes, GroupFormat

_CENTER = 128  # zero point of eight-bit codes that hold signed numbers
_EXACT_BITS = 4  # of codes up to which a zero point can become a min, see `recast`


def merged_format(formats: Collection[GroupFormat]) -> GroupFormat | None:
    """The format that all of `formats` can be recast to; None where floats and integers would have to share one."""
    distinct = list(dict.fromkeys(formats))
    if len(distinct) == 1:
        return distinct[0]
    if any(kind.float_codes for kind in distinct):
        return None
    tables = {kind.table for kind in distinct}
    table = distinct[0].table if len(tables) == 1 else None
    with_mins = any(kind.has_mins for kind in distinct)
    bits, zero = max(kind.bits for kind in distinct), max(kind.zero for kind in distinct)
    if len(tables) > 1:  # codes become the numbers that the tables name
        bits, zero = 8, max(zero, _CENTER)
    elif bits <= _EXACT_BITS and with_mins:
        zero = 0
    elif table is None:  # codes with a smaller zero are shifted up
        largest = max(2**kind.bits - 1 + zero - kind.zero for kind in distinct)
        bits = next((width for width in WIDTHS if width >= bits and largest < 2**width), 8)
    supergroups = {kind.supergroup for kind in distinct}
    integers = len(supergroups) == 1 and None not in supergroups  # else integer scales become floats
    return GroupFormat(
        bits=bits,
        group=math.gcd(*(kind.group for kind in distinct)),
        zero=zero,
        table=table,
        scale_dtype=I8 if integers else _common_float([kind.scale_dtype for kind in distinct]),
        min_dtype=None if not with_mins else I8 if integers else _common_float(_min_dtypes(distinct)),
        supergroup=distinct[0].supergroup if integers else None,
    )


def recast(weights: GroupCodes, to: GroupFormat) -> GroupCodes:
    """The same values in a format of `merged_format`.

    A zero point that the format has no room for becomes a min: s·c − s·z is exact, as s has at most nineteen
    significant bits and c at most four there.
    """
    own = weights.format
    if own == to:
        return weights
    if widened(own, to.bits) == to:
        return replace(weights, format=to)
    repeat = own.group // to.group
    scales = _spread(weights.scales, repeat, to)
    mins = None if weights.mins is None else _spread(weights.mins, repeat, to)
    if own.table is not None and to.table is None:
        codes, zero = weights.signed().view(np.uint8) ^ np.uint8(_CENTER), _CENTER
    else:
        codes, zero = weights.codes, own.zero
    shift = max(to.zero - zero, 0)
    if to.has_mins and mins is None:
        mins = _times(scales, zero + shift - to.zero)
    return GroupCodes(codes=codes + np.uint8(shift), scales=scales, mins=mins, format=to)


def widened(kind: GroupFormat, bits: int) -> GroupFormat:
    """The same format with wider codes."""
    assert bits >= kind.bits, (bits, kind)
    return replace(kind, bits=bits)


def _min_dtypes(formats: Collection[GroupFormat]) -> list[np.dtype[Any]]:
    return [kind.min_dtype or kind.scale_dtype for kind in formats]


def _common_float(dtypes: Collection[np.dtype[Any]]) -> np.dtype[Any]:
    distinct = set(dtypes)
    only = next(iter(distinct))
    return only if len(distinct) == 1 and only != I8 else F32


def _spread(factors: Factors, repeat: int, to: GroupFormat) -> Factors:
    """One for each group of a format; integers stay where it has them."""
    if to.supergroup is None:
        return Factors(np.repeat(factors.flat(), repeat, axis=1))
    return Factors(np.repeat(factors.values, repeat, axis=1), factors.supers)


def _times(factors: Factors, number: int) -> Factors:
    if factors.supers is None:
        return Factors(factors.values * np.float32(number))
    values = factors.values.astype(np.int16) * number  # of Q3_K at most 32 · 4
    assert values.min(initial=0) >= -128, (number, factors)
    assert values.max(initial=0) <= 127, (number, factors)
    return Factors(values.astype(np.int8), factors.supers)
