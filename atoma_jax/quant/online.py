"""Quantizing dense weights while they load (`--quantization`): f32 rows become codes with scales, in memory.

Owns the schemes and their formats. No file holds them: files have the types of `ggml.py` and the other readers, and are
written by `quantizers.py`. Bits below count codes and scales; errors are Σ(w − ŵ)² ÷ Σw², of normal weights and of
weights with the tails of Student's t with 5 degrees of freedom.

scheme        bits a weight  normal   tails
int8          8.5            2.9e-5   4.7e-5   as Q8_0; groups of 128 would save 4 %, at 1.5 and 2 times the error
int8_channel  8              7.5e-5   4.5e-4   K = 4096; one scale a row can be applied after a product, as W8A8 does
fp8           8              7.1e-4   6.9e-4   e4m3; worse than int8, and steady however long the tails are
int4          5              4.8e-3   6.5e-3   Q4_K has 5.1e-3 and 7.0e-3 at 4.5 bits
ternary       2.06           0.21     0.31     useless on models that were not trained for it

Ternary codes are those of BitNet b1.58 (arXiv:2402.17764), round(w / mean|w|) within [−1, 1], but over a group of a row
and not a whole tensor, and the scale is then the best for these codes and not mean|w|. So weights that are ternary
already are kept exactly, and others lose a fifth less. An ordinary model loses its language all the same; and a model
whose master weights were trained with one mean a tensor is to be converted with that mean, not loaded this way.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float32

from atoma_jax.errors import UserError
from atoma_jax.quant.groups import F16, FLOAT8, Factors, GroupCodes, GroupFormat
from atoma_jax.quant.quantizers import check_range
from atoma_jax.quant.scale_search import affine_fit

LoadScheme: TypeAlias = Literal["int8", "int8_channel", "int4", "fp8", "ternary"]
_Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

_F = np.float32
_FP8_MAX = _F(448)  # the largest e4m3fn
_GROUP = 32
_TERNARY_GROUPS = (256, 128, 64, 32)  # the error hardly depends on it, so the largest that fits
_CHUNK = 1 << 16  # elements: what the search works on stays in the cache of a core


def scheme_format(scheme: LoadScheme, K: int) -> GroupFormat:
    """What `quantize_rows` makes of rows of K inputs.

    Raises:
        UserError: the scheme has groups that do not fit K.
    """
    if scheme == "int8":
        return GroupFormat(bits=8, group=_fitting(scheme, K, (_GROUP,)), zero=128, scale_dtype=F16)
    if scheme == "int8_channel":
        return GroupFormat(bits=8, group=K, zero=128)
    if scheme == "int4":
        return GroupFormat(bits=4, group=_fitting(scheme, K, (_GROUP,)), scale_dtype=F16, min_dtype=F16)
    if scheme == "fp8":
        return GroupFormat(bits=8, group=K, float_codes=True)
    return GroupFormat(bits=2, group=_fitting(scheme, K, _TERNARY_GROUPS), zero=1, scale_dtype=F16)


def quantize_rows(values: Float32[np.ndarray, "N K"], scheme: LoadScheme, field: str = "values") -> GroupCodes:
    """Quantizes rows, each for itself. Thread-safe; results own their memory.

    Args:
        values: finite; read only.
        scheme: how.
        field: names the values in errors.

    Raises:
        UserError: the scheme does not fit K, or a value is not finite or too large for it.
    """
    kind = scheme_format(scheme, values.shape[1])
    check_range(values, scheme, field, f16=kind.scale_dtype == F16)
    return _QUANTIZERS[scheme](np.ascontiguousarray(values), kind)


def _fitting(scheme: LoadScheme, K: int, groups: tuple[int, ...]) -> int:
    for group in groups:
        if K % group == 0:
            return group
    problem = f"needs rows of a multiple of {groups[-1]} inputs and this tensor has {K}; w8a8 and fp8 take any"
    raise UserError("quantization", scheme, problem)


def _grouped(values: _Floats, kind: GroupFormat) -> _Floats:
    """[N, K/g, g]."""
    return values.reshape(len(values), values.shape[1] // kind.group, kind.group)


def _divided(values: _Floats, scales: _Floats) -> _Floats:
    """values / scales; 0 where the scale is."""
    return np.divide(values, scales, out=np.zeros_like(values), where=np.broadcast_to(scales != 0, values.shape))


def _symmetric(values: _Floats, kind: GroupFormat) -> GroupCodes:
    """−127 to 127, for the scale as it is stored."""
    groups = _grouped(values, kind)
    scales = np.abs(groups).max(axis=2) / _F(127)
    scales = scales.astype(kind.scale_dtype).astype(np.float32)
    numbers = np.clip(np.rint(_divided(groups, scales[..., None])), -127, 127)
    return GroupCodes((numbers + 128).astype(np.uint8).reshape(values.shape), Factors(scales), None, kind)


def _int4(values: _Floats, kind: GroupFormat) -> GroupCodes:
    """Scale and min by least squares over a few tries, then the nearest codes for both as they are stored."""
    groups = values.reshape(-1, kind.group)
    codes = np.empty(groups.shape, np.uint8)
    scales, mins = np.empty(len(groups), np.float32), np.empty(len(groups), np.float32)
    step = _CHUNK // kind.group
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        x = np.ascontiguousarray(groups[part].T)
        fit = affine_fit(x, np.ones_like(x), top=15, first=-1.0, step=0.1, tries=21)
        scales[part] = fit.scales.astype(np.float16)
        mins[part] = fit.mins.astype(np.float16)
        codes[part] = np.clip(np.rint(_divided(x + mins[part], scales[part])), 0, 15).T
    by_group = (len(values), values.shape[1] // kind.group)
    return GroupCodes(
        codes.reshape(values.shape), Factors(scales.reshape(by_group)), Factors(mins.reshape(by_group)), kind
    )


def _fp8(values: _Floats, kind: GroupFormat) -> GroupCodes:
    """One scale a row, so that its largest value becomes the largest e4m3."""
    scales = np.abs(values).max(axis=1, keepdims=True) / _FP8_MAX
    numbers = np.clip(_divided(values, scales), -_FP8_MAX, _FP8_MAX)  # e4m3fn has no infinity: beyond is NaN
    return GroupCodes(numbers.astype(FLOAT8).view(np.uint8), Factors(scales), None, kind)


def _ternary(values: _Floats, kind: GroupFormat) -> GroupCodes:
    groups = _grouped(values, kind)
    trits = np.clip(np.rint(_divided(groups, np.abs(groups).mean(axis=2, keepdims=True))), -1, 1)
    kept = np.abs(trits).sum(axis=2)
    scales = _divided((groups * trits).sum(axis=2), kept).astype(np.float16).astype(np.float32)
    return GroupCodes((trits + 1).astype(np.uint8).reshape(values.shape), Factors(scales), None, kind)


_QUANTIZERS: Mapping[LoadScheme, Callable[[_Floats, GroupFormat], GroupCodes]] = MappingProxyType(
    {"int8": _symmetric, "int8_channel": _symmetric, "int4": _int4, "fp8": _fp8, "ternary": _ternary}
)
