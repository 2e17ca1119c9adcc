"""From f32 to ggml's tensor types with numpy: what `ggml.dequantize` reads.

Owns the one entry, `quantize`, and the types whose scale is simply the largest value; those that search are
`k_quantizers.py`'s. Bytes equal ggml's for every type. Works on any slice of rows, keeps no state and leaves the
interpreter lock in numpy: callers may quantize chunks in threads. Nothing here knows files or chooses types.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32, UInt8

from atoma_jax.errors import UserError
from atoma_jax.quant import k_quantizers
from atoma_jax.quant.ggml_types import BLOCK_SIZES, GGMLType
from atoma_jax.quant.groups import BF16
from atoma_jax.quant.k_quantizers import half_bytes, nibbles, two_bits

_Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
_Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
_Quantizer: TypeAlias = Callable[[_Floats], _Bytes]  # [blocks, elements] → [blocks, bytes]

_F = np.float32
_CHUNK = 1 << 16  # elements: what a search works on stays in the cache of a core
_LARGEST_HALF = 65504.0
# Of MXFP4: the code for a magnitude in halves of a scale, rounded up. A tie goes to the smaller number, as the bounds
# (1, 3, 5, 7, 10, 14, 20) between the doubled numbers 0, 2, 4, 6, 8, 12, 16, 24 say.
_MXFP4_CODES = np.searchsorted((1, 3, 5, 7, 10, 14, 20), np.arange(22), side="left").astype(np.uint8)


def quantize(
    values: Float32[np.ndarray, "N K"], ggml_type: GGMLType, field: str = "values"
) -> UInt8[np.ndarray, "N row_bytes"]:
    """Rows of blocks.

    Args:
        values: finite; K a multiple of the type's block. Read only.
        ggml_type: one of `QUANTIZERS`.
        field: names the values in errors.

    Raises:
        UserError: a value is not finite, or too large for a type with f16 scales; or the type has no quantizer.
    """
    if ggml_type not in QUANTIZERS:
        writable = ", ".join(t.name for t in sorted(QUANTIZERS))
        raise UserError(f"{field}: tensor type", ggml_type.name, f"must be one of {writable}")
    size = BLOCK_SIZES[ggml_type]
    N, K = values.shape
    assert K % size.elements == 0, (K, ggml_type)
    check_range(values, ggml_type.name, field, f16=ggml_type not in (GGMLType.F32, GGMLType.BF16))
    blocks = np.ascontiguousarray(values).reshape(-1, size.elements)
    raw = np.empty((len(blocks), size.bytes), np.uint8)
    step = max(1, _CHUNK // size.elements)
    for start in range(0, len(blocks), step):
        raw[start : start + step] = QUANTIZERS[ggml_type](blocks[start : start + step])
    return raw.reshape(N, K // size.elements * size.bytes)


def check_range(values: _Floats, type_name: str, field: str, *, f16: bool) -> None:
    """Raises UserError about `field` if a value is not finite or, where scales are `f16`, too large for one."""
    largest = float(np.abs(values).max(initial=0.0))
    if not np.isfinite(largest):
        raise UserError(field, largest, "must be finite numbers: the file is damaged, or was trained to overflow")
    if f16 and largest > _LARGEST_HALF:
        problem = f"must be at most {_LARGEST_HALF:.0f}, the largest f16, for {type_name}; keep the tensor in BF16"
        raise UserError(field, largest, problem)


def _round_half_away(values: _Floats) -> _Floats:
    """C's roundf; numpy rounds halves to even."""
    magnitude = np.abs(values)
    whole = np.floor(magnitude)
    whole += np.floor(2 * (magnitude - whole))
    return np.copysign(whole, values)


def _inverse(scales: _Floats) -> _Floats:
    """1 / scale, [blocks, 1]; 0 where there is nothing to scale."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = _F(1) / scales
    return np.where(np.isfinite(inverse), inverse, _F(0))[:, None]


def _peaks(blocks: _Floats) -> _Floats:
    """The value of each block that is largest by magnitude, the first of equals, with its sign."""
    first = np.abs(blocks).argmax(axis=1)
    return np.take_along_axis(blocks, first[:, None], axis=1)[:, 0] + _F(0)  # −0 becomes 0


def _nibbles(codes: _Bytes) -> _Bytes:
    """[blocks, 32] codes to [blocks, 16]: the first half is in the low nibbles."""
    return nibbles(codes[:, :16], codes[:, 16:])


def _fifth_bits(codes: _Bytes) -> _Bytes:
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _symmetric(blocks: _Floats, half: int) -> tuple[_Bytes, _Bytes]:
    """Scales and codes around `half`; the largest value has the code 0, for there are more codes below than above."""
    scales = _peaks(blocks) / _F(-half)
    codes = blocks * _inverse(scales)
    codes += _F(half + 0.5)
    return half_bytes(scales), np.minimum(codes, 2 * half - 1).astype(np.uint8)


def _affine(blocks: _Floats, top: int) -> tuple[_Bytes, _Bytes]:
    """Scales with minima, and codes of 0 to `top`."""
    lowest = blocks.min(axis=1, keepdims=True)
    first = (blocks == lowest).argmax(axis=1)  # of 0 and −0 the first, as in C
    lowest = np.take_along_axis(blocks, first[:, None], axis=1)[:, 0]
    scales = (blocks.max(axis=1) - lowest + _F(0)) / _F(top)  # −0 becomes 0
    codes = (blocks - lowest[:, None]) * _inverse(scales)
    codes += _F(0.5)
    factors = np.concatenate([half_bytes(scales), half_bytes(lowest)], axis=1)
    return factors, np.minimum(codes, top).astype(np.uint8)


def _q4_0(blocks: _Floats) -> _Bytes:
    factors, codes = _symmetric(blocks, 8)
    return np.concatenate([factors, _nibbles(codes)], axis=1)


def _q4_1(blocks: _Floats) -> _Bytes:
    factors, codes = _affine(blocks, 15)
    return np.concatenate([factors, _nibbles(codes)], axis=1)


def _q5_0(blocks: _Floats) -> _Bytes:
    factors, codes = _symmetric(blocks, 16)
    return np.concatenate([factors, _fifth_bits(codes), _nibbles(codes)], axis=1)


def _q5_1(blocks: _Floats) -> _Bytes:
    factors, codes = _affine(blocks, 31)
    return np.concatenate([factors, _fifth_bits(codes), _nibbles(codes)], axis=1)


def _q8_0(blocks: _Floats) -> _Bytes:
    scales = np.abs(blocks).max(axis=1) / _F(127)
    codes = _round_half_away(blocks * _inverse(scales)).astype(np.int8).view(np.uint8)
    return np.concatenate([half_bytes(scales), codes], axis=1)


def _trits(blocks: _Floats) -> tuple[_Bytes, _Bytes]:
    """Scales, and 0, 1, 2 for −1, 0, 1. The scale is the largest value: exact where weights are ternary already."""
    scales = np.abs(blocks).max(axis=1)
    codes = _round_half_away(blocks * _inverse(scales)).astype(np.int8) + np.int8(1)
    return half_bytes(scales), codes.view(np.uint8)


def _tq1_0(blocks: _Floats) -> _Bytes:
    """Five trits a byte, as a fraction of 3⁵, rounded up: multiplying by 3 brings them out of the top in turn."""
    scales, codes = _trits(blocks)
    parts: list[_Bytes] = []
    for start, digits, width in ((0, 5, 32), (160, 5, 16), (240, 4, 4)):
        trits = codes[:, start : start + digits * width].reshape(-1, digits, width).astype(np.uint16)
        number = np.zeros((len(blocks), width), np.uint16)
        for digit in range(5):
            number *= 3
            if digit < digits:
                number += trits[:, digit]
        parts.append(((number * 256 + 242) // 243).astype(np.uint8))
    return np.concatenate([*parts, scales], axis=1)


def _tq2_0(blocks: _Floats) -> _Bytes:
    scales, codes = _trits(blocks)
    return np.concatenate([two_bits(codes), scales], axis=1)


def _mxfp4(blocks: _Floats) -> _Bytes:
    """A power of two for 32 elements: the largest one's, so that values above 1.5 times its reach are cut off."""
    largest = np.abs(blocks).max(axis=1)
    with np.errstate(divide="ignore"):
        # Rounded to f32 as ggml's log2f is: just below a power of two it counts as that power.
        exponent = np.floor(np.log2(largest.astype(np.float64)).astype(np.float32)) - 2 + 127
    stored = np.where(largest > 0, np.clip(exponent, 0, 254), 0).astype(np.uint8)
    doubled = np.ldexp(np.abs(blocks), 129 - stored.astype(np.int32)[:, None])  # in halves of a scale; exact
    codes = _MXFP4_CODES[np.minimum(np.ceil(doubled), len(_MXFP4_CODES) - 1).astype(np.intp)]
    codes[(blocks < 0) & (codes > 0)] |= 8
    return np.concatenate([stored[:, None], _nibbles(codes)], axis=1)


def _f32(blocks: _Floats) -> _Bytes:
    return blocks.astype("<f4").view(np.uint8)


def _f16(blocks: _Floats) -> _Bytes:
    return blocks.astype("<f2").view(np.uint8)


def _bf16(blocks: _Floats) -> _Bytes:
    return blocks.astype(BF16).view(np.uint8)


QUANTIZERS: Mapping[GGMLType, _Quantizer] = MappingProxyType(
    {
        GGMLType.F32: _f32,
        GGMLType.F16: _f16,
        GGMLType.BF16: _bf16,
        GGMLType.Q4_0: _q4_0,
        GGMLType.Q4_1: _q4_1,
        GGMLType.Q5_0: _q5_0,
        GGMLType.Q5_1: _q5_1,
        GGMLType.Q8_0: _q8_0,
        GGMLType.Q2_K: k_quantizers.q2_k,
        GGMLType.Q3_K: k_quantizers.q3_k,
        GGMLType.Q4_K: k_quantizers.q4_k,
        GGMLType.Q5_K: k_quantizers.q5_k,
        GGMLType.Q6_K: k_quantizers.q6_k,
        GGMLType.IQ4_NL: k_quantizers.iq4_nl,
        GGMLType.TQ1_0: _tq1_0,
        GGMLType.TQ2_0: _tq2_0,
        GGMLType.MXFP4: _mxfp4,
    }
)
