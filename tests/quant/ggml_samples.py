"""Rows of every ggml type for tests: random blocks, what they decode to by an independent decoder, golden vectors."""

from pathlib import Path

import gguf
import numpy as np

from atoma_jax.quant.ggml import GROUP_FORMATS
from atoma_jax.quant.ggml_types import BLOCK_SIZES, GGMLType

GROUPED = sorted(GROUP_FORMATS)
# Where a block holds f16 numbers; every other byte may have any value. The f16 of IQ1_M lies elsewhere: see put_halves.
HALVES = {
    GGMLType.F16: (0,),
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ2_XXS: (0,),
    GGMLType.IQ2_XS: (0,),
    GGMLType.IQ2_S: (0,),
    GGMLType.IQ3_XXS: (0,),
    GGMLType.IQ3_S: (0,),
    GGMLType.IQ1_S: (0,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.IQ4_XS: (0,),
    GGMLType.TQ1_0: (52,),
    GGMLType.TQ2_0: (64,),
    GGMLType.Q1_0: (0,),
    GGMLType.Q2_0: (0,),
}
WITH_HALVES = sorted({*HALVES, GGMLType.IQ1_M} - {GGMLType.F16})
FINITE_HALVES = np.arange(65536, dtype=np.uint16).view(np.float16)
FINITE_HALVES = FINITE_HALVES[np.isfinite(FINITE_HALVES)]  # both zeros, subnormals, ± 65504


def put_halves(blocks: np.ndarray, ggml_type: GGMLType, values: np.ndarray) -> None:
    """Writes f16 numbers `[rows, blocks, fields]` into every block's fields."""
    if ggml_type is GGMLType.IQ1_M:  # four bits of the number in the upper nibble of each of four u16
        words = blocks[..., 48:56].view("<u2")
        for nibble in range(4):
            words[..., nibble] = words[..., nibble] & 0xFFF | (values[..., 0].view("<u2") >> 4 * nibble & 15) << 12
        return
    for field, offset in enumerate(HALVES.get(ggml_type, ())):
        blocks[..., offset : offset + 2] = np.ascontiguousarray(values[..., field : field + 1]).view(np.uint8)


def random_rows(ggml_type: GGMLType, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Blocks of random bits, but for f16 fields: those are random finite numbers."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, BLOCK_SIZES[ggml_type].bytes), dtype=np.uint8)
    put_halves(raw, ggml_type, rng.choice(FINITE_HALVES, (rows, blocks, 2)))
    return raw.reshape(rows, -1)


@np.errstate(invalid="ignore", over="ignore")
def reference(raw: np.ndarray, ggml_type: GGMLType) -> np.ndarray:
    """What the gguf package decodes rows to; the two newest types, for which it has no decoder, by ggml's own loops."""
    if ggml_type in (GGMLType.Q1_0, GGMLType.Q2_0):
        rows = raw.reshape(len(raw), -1, BLOCK_SIZES[ggml_type].bytes)
        loop = _q1_0 if ggml_type is GGMLType.Q1_0 else _q2_0
        return np.array([[loop(block) for block in row] for row in rows], np.float32).reshape(len(raw), -1)
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(ggml_type))


def _q1_0(block: np.ndarray) -> list[np.float32]:
    """dequantize_row_q1_0 of ggml-quants.c, element by element: a set bit is d, others are −d."""
    d = np.float32(block[:2].view("<f2")[0])
    return [d if int(block[2 + j // 8]) >> j % 8 & 1 else -d for j in range(128)]


def _q2_0(block: np.ndarray) -> list[np.float32]:
    """dequantize_row_q2_0, likewise: (q − 1) · d."""
    d = np.float32(block[:2].view("<f2")[0])
    return [np.float32((int(block[2 + j // 4]) >> j % 4 * 2 & 3) - 1) * d for j in range(64)]


def golden(ggml_type: GGMLType) -> tuple[np.ndarray, np.ndarray]:
    """Rows that ggml quantized, and what it made of them again."""
    with np.load(Path(__file__).parents[1] / "data" / "gguf_type_vectors.npz") as vectors:
        return vectors[f"{ggml_type.name}_q"], vectors[f"{ggml_type.name}_y"]


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))  # −0.0 is not 0.0 here
