"""Exact decoding of ggml's tensor types with numpy.

`decode` takes blocks apart into codes, scales and mins, `dequantize` turns them into f32. The bit layout of each type
is in `ggml_blocks.py` and its neighbours. Nothing here reads files (`loading/gguf/file.py`) or knows how kernels want
codes packed. Both functions work on any slice of rows, release the interpreter lock in numpy, and keep no state:
callers may decode chunks in threads.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32, UInt8

from atoma_jax.errors import UnsupportedModelError
from atoma_jax.quant import ggml_blocks as blocks
from atoma_jax.quant import ggml_fp4_blocks as fp4
from atoma_jax.quant import ggml_iq_blocks as iq
from atoma_jax.quant import ggml_ternary_blocks as ternary
from atoma_jax.quant.ggml_types import BLOCK_SIZES, GGMLType
from atoma_jax.quant.groups import BF16, F16, I8, Factors, GroupCodes, GroupFormat

_Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
_Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
_Numbers: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def _table(group: int, table: tuple[int, ...]) -> GroupFormat:
    """IQ types: numbers of a table times an integer for each group and an f16, or a part of it, for each block."""
    return GroupFormat(bits=4, group=group, table=table, scale_dtype=I8, supergroup=256)


# The legacy types, fp4 and the ternary family store one float a group; a K or IQ type stores integers, and an f16 for
# each block of 256. The scales of MXFP4 are powers of two from 2^-128 to 2^127, for which f16 has too few exponents.
_TYPES: Mapping[GGMLType, tuple[GroupFormat, blocks.Decoder]] = MappingProxyType(
    {
        GGMLType.Q4_0: (GroupFormat(bits=4, group=32, zero=8, scale_dtype=F16), blocks.q4_0),
        GGMLType.Q4_1: (GroupFormat(bits=4, group=32, scale_dtype=F16, min_dtype=F16), blocks.q4_1),
        GGMLType.Q5_0: (GroupFormat(bits=5, group=32, zero=16, scale_dtype=F16), blocks.q5_0),
        GGMLType.Q5_1: (GroupFormat(bits=5, group=32, scale_dtype=F16, min_dtype=F16), blocks.q5_1),
        GGMLType.Q8_0: (GroupFormat(bits=8, group=32, zero=128, scale_dtype=F16), blocks.q8_0),
        GGMLType.Q2_K: (GroupFormat(bits=2, group=16, scale_dtype=I8, min_dtype=I8, supergroup=256), blocks.q2_k),
        GGMLType.Q3_K: (GroupFormat(bits=3, group=16, zero=4, scale_dtype=I8, supergroup=256), blocks.q3_k),
        GGMLType.Q4_K: (GroupFormat(bits=4, group=32, scale_dtype=I8, min_dtype=I8, supergroup=256), blocks.q4_k),
        GGMLType.Q5_K: (GroupFormat(bits=5, group=32, scale_dtype=I8, min_dtype=I8, supergroup=256), blocks.q5_k),
        GGMLType.Q6_K: (GroupFormat(bits=6, group=16, zero=32, scale_dtype=I8, supergroup=256), blocks.q6_k),
        GGMLType.IQ1_S: (_table(32, iq.IQ1_TABLE), iq.iq1_s),
        GGMLType.IQ1_M: (_table(16, iq.IQ1_TABLE), iq.iq1_m),
        GGMLType.IQ2_XXS: (_table(32, iq.IQ2_TABLE), iq.iq2_xxs),
        GGMLType.IQ2_XS: (_table(16, iq.IQ2_TABLE), iq.iq2_xs),
        GGMLType.IQ2_S: (_table(16, iq.IQ2_TABLE), iq.iq2_s),
        GGMLType.IQ3_XXS: (_table(32, iq.IQ3_XXS_TABLE), iq.iq3_xxs),
        GGMLType.IQ3_S: (_table(32, iq.IQ3_S_TABLE), iq.iq3_s),
        GGMLType.IQ4_NL: (GroupFormat(bits=4, group=32, table=iq.IQ4_TABLE, scale_dtype=F16), iq.iq4_nl),
        GGMLType.IQ4_XS: (_table(32, iq.IQ4_TABLE), iq.iq4_xs),
        GGMLType.TQ1_0: (GroupFormat(bits=2, group=256, zero=1, scale_dtype=F16), ternary.tq1_0),
        GGMLType.TQ2_0: (GroupFormat(bits=2, group=256, zero=1, scale_dtype=F16), ternary.tq2_0),
        GGMLType.Q1_0: (GroupFormat(bits=2, group=128, zero=1, scale_dtype=F16), ternary.q1_0),
        GGMLType.Q2_0: (GroupFormat(bits=2, group=64, zero=1, scale_dtype=F16), ternary.q2_0),
        GGMLType.MXFP4: (GroupFormat(bits=4, group=32, table=fp4.FP4_TABLE, scale_dtype=BF16), fp4.mxfp4),
        GGMLType.NVFP4: (GroupFormat(bits=4, group=16, table=fp4.FP4_TABLE, scale_dtype=F16), fp4.nvfp4),
    }
)
GROUP_FORMATS: Mapping[GGMLType, GroupFormat] = MappingProxyType({t: grouping for t, (grouping, _) in _TYPES.items()})

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
    """Takes quantized rows apart. Results own their memory; the peak is 1 to 3 bytes an element, codes included.

    Args:
        raw: whole rows of blocks, such as `GGUFTensor.data` or a slice of its rows.
        ggml_type: a type of `GROUP_FORMATS`.

    Raises:
        UnsupportedModelError: the type has no decoder.
    """
    check_supported("tensor type", ggml_type)
    assert ggml_type not in FLOAT_TYPES, f"{ggml_type.name} has no codes: use dequantize"
    grouping, decoder = _TYPES[ggml_type]
    parts = decoder(_as_blocks(raw, ggml_type))
    size = BLOCK_SIZES[ggml_type]
    N, K = raw.shape[0], raw.shape[1] // size.bytes * size.elements

    def factors(values: _Numbers, supers: _Floats | None) -> Factors:
        by_group = values.reshape(N, K // grouping.group)
        if supers is None or grouping.supergroup is None:
            return Factors(by_group)
        return Factors(by_group, supers.reshape(N, K // grouping.supergroup))

    return GroupCodes(
        codes=parts.codes.reshape(N, K),
        scales=factors(parts.scales, parts.scale_supers),
        mins=None if parts.mins is None else factors(parts.mins, parts.min_supers),
        format=grouping,
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
