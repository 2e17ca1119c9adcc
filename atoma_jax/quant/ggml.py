"""Exact decoding of ggml's block types with numpy.

Owns the bit layout of each type: `decode` takes blocks apart into codes, scales and mins, `dequantize` turns them into
f32. It does not read files (`loading/gguf.py`) and does not know how kernels want codes packed. Both functions work on
any slice of rows, release the interpreter lock in numpy, and keep no state: callers may decode chunks in threads.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, arithmetic: ggml-quants.c beside it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float32, UInt8

from atoma_jax.errors import UnsupportedModelError
from atoma_jax.quant.ggml_types import BLOCK_SIZES, GGMLType

_Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
_Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class GroupFormat:
    """What is the same for every tensor of a quantized type: enough to plan arrays from a file's header alone."""

    bits: int  # width of a code once decoded, 4 or 8: five- and six-bit codes take 8
    group: int  # neighbours along K that share one scale
    zero: int  # subtracted from a code before it is scaled
    has_mins: bool  # a min is subtracted after scaling; zero is 0 then
    scale_dtype: np.dtype[Any]  # the narrowest type that holds scales and mins exactly


@dataclass(frozen=True, slots=True, eq=False)
class GroupCodes:
    """Decoded rows: value = scales · (codes − zero) − mins, in f32, each operation rounded once as ggml does.

    The fields beside the arrays are those of the type's `GroupFormat`.
    """

    codes: UInt8[np.ndarray, "N K"]  # unsigned, natural order along K
    scales: Float32[np.ndarray, "N groups"]
    mins: Float32[np.ndarray, "N groups"] | None
    bits: int
    group: int
    zero: int
    scale_dtype: np.dtype[Any]


_F16 = np.dtype(np.float16)
_F32 = np.dtype(np.float32)

# The legacy types store one f16 a group. A K type stores f16 × integer, a product that needs up to 19 bits.
GROUP_FORMATS: Mapping[GGMLType, GroupFormat] = MappingProxyType(
    {
        GGMLType.Q4_0: GroupFormat(bits=4, group=32, zero=8, has_mins=False, scale_dtype=_F16),
        GGMLType.Q4_1: GroupFormat(bits=4, group=32, zero=0, has_mins=True, scale_dtype=_F16),
        GGMLType.Q5_0: GroupFormat(bits=8, group=32, zero=16, has_mins=False, scale_dtype=_F16),
        GGMLType.Q5_1: GroupFormat(bits=8, group=32, zero=0, has_mins=True, scale_dtype=_F16),
        GGMLType.Q8_0: GroupFormat(bits=8, group=32, zero=128, has_mins=False, scale_dtype=_F16),
        GGMLType.Q4_K: GroupFormat(bits=4, group=32, zero=0, has_mins=True, scale_dtype=_F32),
        GGMLType.Q5_K: GroupFormat(bits=8, group=32, zero=0, has_mins=True, scale_dtype=_F32),
        GGMLType.Q6_K: GroupFormat(bits=8, group=16, zero=32, has_mins=False, scale_dtype=_F32),
    }
)

FLOAT_TYPES = frozenset({GGMLType.F32, GGMLType.F16, GGMLType.BF16})
SUPPORTED_TYPES = FLOAT_TYPES | GROUP_FORMATS.keys()


def check_supported(field: str, ggml_type: GGMLType) -> None:
    """Raises UnsupportedModelError about `field`, which names file and tensor, if the type has no decoder here."""
    if ggml_type not in SUPPORTED_TYPES:
        readable = ", ".join(t.name for t in sorted(SUPPORTED_TYPES))
        problem = f"this tensor type is not implemented; choose a file that uses only {readable}"
        raise UnsupportedModelError(field, ggml_type.name, problem)


@np.errstate(invalid="ignore")  # a damaged scale may be infinite: infinity × 0 is NaN here as in ggml
def decode(raw: UInt8[np.ndarray, "N row_bytes"], ggml_type: GGMLType) -> GroupCodes:
    """Takes quantized rows apart. Results own their memory; the peak is about 1.5 bytes an element.

    Args:
        raw: whole rows of blocks, such as `GGUFTensor.data` or a slice of its rows.
        ggml_type: a type of `GROUP_FORMATS`.

    Raises:
        UnsupportedModelError: the type has no decoder.
    """
    check_supported("tensor type", ggml_type)
    assert ggml_type not in FLOAT_TYPES, f"{ggml_type.name} has no codes: use dequantize"
    blocks = _as_blocks(raw, ggml_type)
    parts = _DECODERS[ggml_type](blocks)
    N = raw.shape[0]
    K = blocks.shape[1] * BLOCK_SIZES[ggml_type].elements
    geometry = GROUP_FORMATS[ggml_type]
    groups = K // geometry.group
    return GroupCodes(
        codes=parts.codes.reshape(N, K),
        scales=parts.scales.reshape(N, groups),
        mins=None if parts.mins is None else parts.mins.reshape(N, groups),
        bits=geometry.bits,
        group=geometry.group,
        zero=geometry.zero,
        scale_dtype=geometry.scale_dtype,
    )


@np.errstate(invalid="ignore")
def dequantize(raw: UInt8[np.ndarray, "N row_bytes"], ggml_type: GGMLType) -> Float32[np.ndarray, "N K"]:
    """The exact f32 values of rows, bit-equal to ggml's. The result owns its memory.

    Raises:
        UnsupportedModelError: the type has no decoder.
    """
    check_supported("tensor type", ggml_type)
    if ggml_type in FLOAT_TYPES:
        return _widen(raw, ggml_type)
    grouped = decode(raw, ggml_type)
    values = grouped.codes.astype(np.float32)
    values -= np.float32(grouped.zero)
    by_group = values.reshape(*grouped.scales.shape, grouped.group)  # [N, K/G, G]
    by_group *= grouped.scales[..., None]
    if grouped.mins is not None:
        by_group -= grouped.mins[..., None]
    return values


def _widen(raw: _Bytes, ggml_type: GGMLType) -> _Floats:
    """F32, F16 or BF16 rows as f32."""
    raw = np.ascontiguousarray(raw)
    if ggml_type is GGMLType.BF16:
        words = raw.view("<u2").astype(np.uint32)
        words <<= 16
        return words.view(np.float32)
    return raw.view("<f4" if ggml_type is GGMLType.F32 else "<f2").astype(np.float32)


class _Parts(NamedTuple):
    """What a decoder of one type returns: elements and groups of a block are still in axes of their own."""

    codes: _Bytes  # [N, blocks, …] in natural order when flattened
    scales: _Floats  # [N, blocks(, groups)]
    mins: _Floats | None  # as scales


def _as_blocks(raw: _Bytes, ggml_type: GGMLType) -> _Bytes:
    size = BLOCK_SIZES[ggml_type].bytes
    assert raw.dtype == np.uint8, raw.dtype
    assert raw.ndim == 2, raw.shape
    assert raw.shape[1] % size == 0, (raw.shape, ggml_type)
    return raw.reshape(raw.shape[0], raw.shape[1] // size, size)


def _half(blocks: _Bytes, offset: int) -> _Floats:
    """The f16 at a byte offset of every block, as f32 [N, blocks]."""
    return blocks[..., offset : offset + 2].view("<f2")[..., 0].astype(np.float32)


def _nibbles(packed: _Bytes) -> _Bytes:
    """[…, n] bytes to […, 2, n] codes: all low nibbles come before all high ones."""
    packed = np.ascontiguousarray(packed)  # one strided copy is cheaper than two strided reads
    codes = np.empty((*packed.shape[:-1], 2, packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., 0, :])
    np.right_shift(packed, 4, out=codes[..., 1, :])
    return codes


def _fifth_bits(blocks: _Bytes, offset: int) -> _Bytes:
    """A little-endian u32 at a byte offset, bit i belonging to element i, as 0 or 16 in [N, blocks, 2, 16]."""
    bits = np.unpackbits(blocks[..., offset : offset + 4], axis=-1, bitorder="little")  # [N, blocks, 32]
    bits <<= 4
    return bits.reshape(*bits.shape[:-1], 2, 16)


def _q4_0(blocks: _Bytes) -> _Parts:
    return _Parts(_nibbles(blocks[..., 2:18]), _half(blocks, 0), None)


def _q4_1(blocks: _Bytes) -> _Parts:
    return _Parts(_nibbles(blocks[..., 4:20]), _half(blocks, 0), -_half(blocks, 2))


def _q5_0(blocks: _Bytes) -> _Parts:
    codes = _nibbles(blocks[..., 6:22])
    codes |= _fifth_bits(blocks, 2)
    return _Parts(codes, _half(blocks, 0), None)


def _q5_1(blocks: _Bytes) -> _Parts:
    codes = _nibbles(blocks[..., 8:24])
    codes |= _fifth_bits(blocks, 4)
    return _Parts(codes, _half(blocks, 0), -_half(blocks, 2))


def _q8_0(blocks: _Bytes) -> _Parts:
    return _Parts(blocks[..., 2:34] ^ np.uint8(0x80), _half(blocks, 0), None)  # two's complement to offset binary


def _k_scales(blocks: _Bytes) -> tuple[_Floats, _Floats]:
    """Scales and mins [N, blocks, 8] of Q4_K and Q5_K.

    Twelve bytes hold eight pairs of six-bit integers: groups 0–3 in the low six bits of bytes 0–3 (scales) and 4–7
    (mins); groups 4–7 in the nibbles of bytes 8–11, their upper two bits on top of bytes 0–3 and 4–7.
    """
    low_scales, low_mins, nibbles = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = np.concatenate([low_scales & 63, (nibbles & 15) | (low_scales >> 6) << 4], axis=-1)
    mins = np.concatenate([low_mins & 63, (nibbles >> 4) | (low_mins >> 6) << 4], axis=-1)
    d, d_min = _half(blocks, 0)[..., None], _half(blocks, 2)[..., None]
    return d * scales.astype(np.float32), d_min * mins.astype(np.float32)


def _q4_k(blocks: _Bytes) -> _Parts:
    scales, mins = _k_scales(blocks)
    packed = blocks[..., 16:144].reshape(*blocks.shape[:-1], 4, 32)
    return _Parts(_nibbles(packed), scales, mins)


def _q5_k(blocks: _Bytes) -> _Parts:
    scales, mins = _k_scales(blocks)
    packed = blocks[..., 48:176].reshape(*blocks.shape[:-1], 4, 32)
    codes = _nibbles(packed).reshape(*blocks.shape[:-1], 8, 32)
    plane = np.ascontiguousarray(blocks[..., 16:48])  # bit g of byte i: fifth bit of element i of group g
    for g in range(8):
        codes[..., g, :] |= ((plane >> g) & 1) << 4
    return _Parts(codes, scales, mins)


def _q6_k(blocks: _Bytes) -> _Parts:
    leading = blocks.shape[:-1]
    codes = _nibbles(blocks[..., 0:128].reshape(*leading, 2, 64)).reshape(*leading, 2, 4, 32)
    upper = np.ascontiguousarray(blocks[..., 128:192]).reshape(*leading, 2, 32)
    for quarter in range(4):  # two bits a quarter of each half block
        codes[..., quarter, :] |= ((upper >> 2 * quarter) & 3) << 4
    scales = _half(blocks, 208)[..., None] * blocks[..., 192:208].view(np.int8).astype(np.float32)
    return _Parts(codes, scales, None)


_DECODERS: Mapping[GGMLType, Callable[[_Bytes], _Parts]] = MappingProxyType(
    {
        GGMLType.Q4_0: _q4_0,
        GGMLType.Q4_1: _q4_1,
        GGMLType.Q5_0: _q5_0,
        GGMLType.Q5_1: _q5_1,
        GGMLType.Q8_0: _q8_0,
        GGMLType.Q4_K: _q4_k,
        GGMLType.Q5_K: _q5_k,
        GGMLType.Q6_K: _q6_k,
    }
)
