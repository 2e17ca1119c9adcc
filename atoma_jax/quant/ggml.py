"""Exact decoding of ggml's tensor types with numpy.

`decode` takes blocks apart into codes, scales and mins, `dequantize` turns them into f32. The bit layout of each type
is in `ggml_blocks.py`. Nothing here reads files (`loading/gguf.py`) or knows how kernels want codes packed. Both take
any slice of rows, release the interpreter lock in numpy, and keep no state: callers may decode chunks in threads.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32, UInt8

from atoma_jax.errors import UnsupportedModelError
from atoma_jax.quant import ggml_blocks as blocks
from atoma_jax.quant.ggml_types import BLOCK_SIZES, GGMLType
from atoma_jax.quant.groups import F16, I8, Factors, GroupCodes, GroupFormat

_Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
_Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
_Numbers: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# The legacy types store one f16 a group; a K type stores integers, and an f16 for each block of 256.
_TYPES: Mapping[GGMLType, tuple[GroupFormat, blocks.Decoder]] = MappingProxyType(
    {
        GGMLType.Q4_0: (GroupFormat(bits=4, group=32, zero=8, scale_dtype=F16), blocks.q4_0),
        GGMLType.Q4_1: (GroupFormat(bits=4, group=32, scale_dtype=F16, min_dtype=F16), blocks.q4_1),
        GGMLType.Q5_0: (GroupFormat(bits=8, group=32, zero=16, scale_dtype=F16), blocks.q5_0),
        GGMLType.Q5_1: (GroupFormat(bits=8, group=32, scale_dtype=F16, min_dtype=F16), blocks.q5_1),
        GGMLType.Q8_0: (GroupFormat(bits=8, group=32, zero=128, scale_dtype=F16), blocks.q8_0),
        GGMLType.Q4_K: (GroupFormat(bits=4, group=32, scale_dtype=I8, min_dtype=I8, supergroup=256), blocks.q4_k),
        GGMLType.Q5_K: (GroupFormat(bits=8, group=32, scale_dtype=I8, min_dtype=I8, supergroup=256), blocks.q5_k),
        GGMLType.Q6_K: (GroupFormat(bits=8, group=16, zero=32, scale_dtype=I8, supergroup=256), blocks.q6_k),
    }
)
GROUP_FORMATS: Mapping[GGMLType, GroupFormat] = MappingProxyType({name: kind for name, (kind, _) in _TYPES.items()})

FLOAT_TYPES = frozenset({GGMLType.F32, GGMLType.F16, GGMLType.BF16})
SUPPORTED_TYPES = FLOAT_TYPES | GROUP_FORMATS.keys()


def check_supported(field: str, ggml_type: GGMLType) -> None:
    """Raises UnsupportedModelError about `field`, which names file and tensor, if the type has no decoder here."""
    if ggml_type not in SUPPORTED_TYPES:
        readable = ", ".join(t.name for t in sorted(SUPPORTED_TYPES))
        problem = f"this tensor type is not implemented; choose a file that uses only {readable}"
        raise UnsupportedModelError(field, ggml_type.name, problem)


@np.errstate(invalid="ignore")  # a damaged scale may be infinite
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
    kind, decoder = _TYPES[ggml_type]
    parts = decoder(_as_blocks(raw, ggml_type))
    size = BLOCK_SIZES[ggml_type]
    N, K = raw.shape[0], raw.shape[1] // size.bytes * size.elements

    def factors(values: _Numbers, supers: _Floats | None) -> Factors:
        by_group = values.reshape(N, K // kind.group)
        if supers is None or kind.supergroup is None:
            return Factors(by_group)
        return Factors(by_group, supers.reshape(N, K // kind.supergroup))

    return GroupCodes(
        codes=parts.codes.reshape(N, K),
        scales=factors(parts.scales, parts.scale_supers),
        mins=None if parts.mins is None else factors(parts.mins, parts.min_supers),
        format=kind,
    )


def dequantize(raw: UInt8[np.ndarray, "N row_bytes"], ggml_type: GGMLType) -> Float32[np.ndarray, "N K"]:
    """The exact f32 values of rows, bit-equal to ggml's. The result owns its memory.

    Raises:
        UnsupportedModelError: the type has no decoder.
    """
    check_supported("tensor type", ggml_type)
    return _widen(raw, ggml_type) if ggml_type in FLOAT_TYPES else decode(raw, ggml_type).values()


def _widen(raw: _Bytes, ggml_type: GGMLType) -> _Floats:
    """F32, F16 or BF16 rows as f32."""
    raw = np.ascontiguousarray(raw)
    if ggml_type is GGMLType.BF16:
        words = raw.view("<u2").astype(np.uint32)
        words <<= 16
        return words.view(np.float32)
    return raw.view("<f4" if ggml_type is GGMLType.F32 else "<f2").astype(np.float32)


def _as_blocks(raw: _Bytes, ggml_type: GGMLType) -> _Bytes:
    size = BLOCK_SIZES[ggml_type].bytes
    assert raw.dtype == np.uint8, raw.dtype
    assert raw.ndim == 2, raw.shape
    assert raw.shape[1] % size == 0, (raw.shape, ggml_type)
    return raw.reshape(raw.shape[0], raw.shape[1] // size, size)
