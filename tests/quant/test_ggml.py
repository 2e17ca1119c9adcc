"""Decoding of ggml's block types: bit-equal to the gguf package and to ggml's own golden vectors."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from atoma_jax.errors import UnsupportedModelError
from atoma_jax.quant.ggml import FLOAT_TYPES, GROUP_FORMATS, SUPPORTED_TYPES, decode, dequantize
from atoma_jax.quant.ggml_types import BLOCK_SIZES, GGMLType

# Where a block holds f16 numbers; every other byte of a block may have any value.
HALVES = {
    GGMLType.F16: (0,),
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
}
GROUPED = sorted(GROUP_FORMATS)
FINITE_HALVES = np.arange(65536, dtype=np.uint16).view(np.float16)
FINITE_HALVES = FINITE_HALVES[np.isfinite(FINITE_HALVES)]  # both zeros, subnormals, ± 65504


def random_rows(ggml_type: GGMLType, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Blocks of random bits, but for f16 fields: those are random finite numbers."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, BLOCK_SIZES[ggml_type].bytes), dtype=np.uint8)
    for offset in HALVES.get(ggml_type, ()):
        values = rng.choice(FINITE_HALVES, (rows, blocks, 1))
        raw[..., offset : offset + 2] = values.view(np.uint8)
    return raw.reshape(rows, -1)


def reference(raw: np.ndarray, ggml_type: GGMLType) -> np.ndarray:
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(ggml_type))


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))  # −0.0 is not 0.0 here


@pytest.mark.parametrize("ggml_type", sorted(SUPPORTED_TYPES - {GGMLType.F32, GGMLType.BF16}), ids=lambda t: t.name)
def test_dequantize_is_bit_equal_to_gguf_on_random_blocks(ggml_type: GGMLType) -> None:
    raw = random_rows(ggml_type, rows=48, blocks=24)
    assert_same_bits(dequantize(raw, ggml_type), reference(raw, ggml_type))


@pytest.mark.parametrize("ggml_type", [GGMLType.F32, GGMLType.BF16], ids=lambda t: t.name)
def test_plain_floats_keep_every_bit(ggml_type: GGMLType) -> None:
    values = np.random.default_rng(1).standard_normal((3, 40)).astype(np.float32)
    values[0, :4] = [0.0, -0.0, np.inf, 1e-42]
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType(ggml_type)).view(np.uint8)
    assert_same_bits(dequantize(raw, ggml_type), reference(raw, ggml_type))


@pytest.mark.parametrize("ggml_type", GROUPED, ids=lambda t: t.name)
def test_dequantize_equals_the_golden_vectors_of_ggml(ggml_type: GGMLType) -> None:
    with np.load(Path(__file__).parents[1] / "data" / "gguf_type_vectors.npz") as vectors:
        raw, expected = vectors[f"{ggml_type.name}_q"], vectors[f"{ggml_type.name}_y"]
    assert_same_bits(dequantize(raw, ggml_type), expected)


@pytest.mark.parametrize("ggml_type", GROUPED, ids=lambda t: t.name)
def test_decode_returns_what_its_formula_promises(ggml_type: GGMLType) -> None:
    raw = random_rows(ggml_type, rows=5, blocks=6, seed=2)
    grouped = decode(raw, ggml_type)
    expected = reference(raw, ggml_type)
    N, K = expected.shape
    assert grouped.codes.shape == (N, K)
    assert grouped.codes.dtype == np.uint8
    assert grouped.codes.max() < 2**grouped.bits
    assert grouped.scales.shape == (N, K // grouped.group)
    spread = grouped.scales.repeat(grouped.group, axis=1)
    values = spread * (grouped.codes.astype(np.float32) - np.float32(grouped.zero))
    if grouped.mins is not None:
        assert grouped.mins.shape == grouped.scales.shape
        values = values - grouped.mins.repeat(grouped.group, axis=1)
    assert_same_bits(values, expected)


@pytest.mark.parametrize("ggml_type", GROUPED, ids=lambda t: t.name)
def test_the_declared_format_of_a_type_describes_its_codes(ggml_type: GGMLType) -> None:
    declared = GROUP_FORMATS[ggml_type]
    grouped = decode(random_rows(ggml_type, rows=2, blocks=1), ggml_type)
    fields = (grouped.bits, grouped.group, grouped.zero, grouped.mins is not None, grouped.scale_dtype)
    assert fields == (declared.bits, declared.group, declared.zero, declared.has_mins, declared.scale_dtype)
    assert BLOCK_SIZES[ggml_type].elements % declared.group == 0


@pytest.mark.parametrize("ggml_type", GROUPED, ids=lambda t: t.name)
def test_scale_dtype_is_the_narrowest_that_is_exact(ggml_type: GGMLType) -> None:
    grouped = decode(random_rows(ggml_type, rows=16, blocks=16, seed=3), ggml_type)
    with np.errstate(over="ignore"):
        exact_in_half = all(
            np.array_equal(numbers, numbers.astype(np.float16).astype(np.float32))
            for numbers in (grouped.scales, grouped.mins)
            if numbers is not None
        )
    assert grouped.scale_dtype == (np.float16 if exact_in_half else np.float32)


def test_every_finite_half_is_read_as_a_scale() -> None:
    raw = np.zeros((1, FINITE_HALVES.size, 34), np.uint8)
    raw[0, :, :2] = FINITE_HALVES.view(np.uint8).reshape(-1, 2)
    raw[0, :, 2:] = np.arange(32)
    raw = raw.reshape(1, -1)
    assert_same_bits(dequantize(raw, GGMLType.Q8_0), reference(raw, GGMLType.Q8_0))


@pytest.mark.parametrize("ggml_type", sorted(SUPPORTED_TYPES), ids=lambda t: t.name)
def test_a_slice_of_rows_decodes_as_it_does_in_the_whole(ggml_type: GGMLType) -> None:
    raw = random_rows(ggml_type, rows=9, blocks=3, seed=4)
    raw.flags.writeable = False  # as a mapped file's
    np.testing.assert_array_equal(dequantize(raw[4:7], ggml_type), dequantize(raw, ggml_type)[4:7])
    assert dequantize(raw[:0], ggml_type).shape == (0, 3 * BLOCK_SIZES[ggml_type].elements)


@pytest.mark.parametrize("ggml_type", sorted(SUPPORTED_TYPES), ids=lambda t: t.name)
def test_results_do_not_alias_the_file(ggml_type: GGMLType) -> None:
    raw = random_rows(ggml_type, rows=2, blocks=1)
    assert not np.shares_memory(dequantize(raw, ggml_type), raw)
    if ggml_type not in FLOAT_TYPES:
        assert not np.shares_memory(decode(raw, ggml_type).codes, raw)


@pytest.mark.parametrize("ggml_type", GROUPED, ids=lambda t: t.name)
def test_damaged_scales_give_nan_as_in_ggml_and_no_warning(ggml_type: GGMLType) -> None:
    raw = random_rows(ggml_type, rows=2, blocks=4).reshape(2, 4, -1)
    raw[0] = 0  # infinity × 0 where a type multiplies scales, too
    for offset in HALVES[ggml_type]:
        raw[..., offset : offset + 2] = np.array([0x00, 0x7C])  # infinity
    raw = raw.reshape(2, -1)
    with np.errstate(invalid="ignore"):
        expected = reference(raw, ggml_type)
    np.testing.assert_array_equal(dequantize(raw, ggml_type), expected)
    assert not np.isfinite(decode(raw, ggml_type).scales).any()


@pytest.mark.parametrize("function", [decode, dequantize])
def test_a_type_without_decoder_is_refused_by_name(function) -> None:
    with pytest.raises(UnsupportedModelError, match=r"F32, F16, Q4_0.*Q6_K, BF16, got 'IQ2_S'"):
        function(np.zeros((1, 82), np.uint8), GGMLType.IQ2_S)


def test_ids_and_block_sizes_are_those_of_gguf() -> None:
    for theirs, size in gguf.GGML_QUANT_SIZES.items():
        assert GGMLType(theirs).name == theirs.name
        if theirs.name != "Q8_1":  # the package counts two f32 where ggml-common.h has two f16; no file holds it
            assert BLOCK_SIZES[GGMLType(theirs)] == size
    assert BLOCK_SIZES.keys() == set(GGMLType)
