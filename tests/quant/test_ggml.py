"""Decoding of ggml's block types: bit-equal to the gguf package, to libgguf and to ggml's own golden vectors."""

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest

from atoma_jax.errors import UnsupportedModelError
from atoma_jax.quant import ggml_grids
from atoma_jax.quant.ggml import FLOAT_TYPES, SUPPORTED_TYPES, decode, dequantize
from atoma_jax.quant.ggml_types import BLOCK_SIZES, GGMLType
from tests.quant.ggml_samples import (
    FINITE_HALVES,
    GROUPED,
    WITH_HALVES,
    assert_same_bits,
    golden,
    put_halves,
    random_rows,
    reference,
)

# What libgguf quantizes to: Q2_0 is newer. Some types make it search neighbours of a large grid first, for 5 to 20 s.
SEARCHING = {GGMLType.IQ1_S, GGMLType.IQ1_M, GGMLType.IQ2_XS, GGMLType.IQ2_S}
QUANTIZABLE = [
    pytest.param(kind, marks=[pytest.mark.slow] if kind in SEARCHING else [])
    for kind in GROUPED
    if kind is not GGMLType.Q2_0
]


def named(ggml_type: GGMLType) -> str:
    return ggml_type.name


def test_every_type_decodes_but_integers_f64_and_those_of_activations() -> None:
    without = {t for t in GGMLType if t.name in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")}
    assert set(GGMLType) - without == SUPPORTED_TYPES


@pytest.mark.parametrize("ggml_type", sorted(SUPPORTED_TYPES - {GGMLType.F32, GGMLType.BF16}), ids=named)
def test_dequantize_is_bit_equal_to_gguf_on_random_blocks(ggml_type: GGMLType) -> None:
    raw = random_rows(ggml_type, rows=24, blocks=24)
    assert_same_bits(dequantize(raw, ggml_type), reference(raw, ggml_type))


@pytest.mark.parametrize("ggml_type", [GGMLType.F32, GGMLType.BF16], ids=named)
def test_plain_floats_keep_every_bit(ggml_type: GGMLType) -> None:
    values = np.random.default_rng(1).standard_normal((3, 40)).astype(np.float32)
    values[0, :4] = [0.0, -0.0, np.inf, 1e-42]
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType(ggml_type)).view(np.uint8)
    assert_same_bits(dequantize(raw, ggml_type), reference(raw, ggml_type))


@pytest.mark.parametrize("ggml_type", GROUPED, ids=named)
def test_dequantize_equals_the_golden_vectors_of_ggml(ggml_type: GGMLType) -> None:
    raw, expected = golden(ggml_type)
    assert_same_bits(dequantize(raw, ggml_type), expected)


@pytest.mark.parametrize("ggml_type", QUANTIZABLE, ids=named)
def test_weights_that_ggml_quantized_decode_as_it_decodes_them(ggml_type: GGMLType) -> None:
    libgguf = pytest.importorskip("libgguf", reason="libgguf has wheels for Linux on x86-64 only")
    rng = np.random.default_rng(5)
    N, K = 3, 512
    weights = rng.standard_normal((N, K)) * rng.lognormal(-4, 0.5, (N, 1))  # rows of unlike size
    weights[:, rng.choice(K, 8, replace=False)] *= 8  # some columns stand out
    importance = rng.lognormal(0, 1, K).astype(np.float32)
    raw = libgguf.quantize_rows(weights.astype(np.float32), int(ggml_type), imatrix=importance)
    raw = np.asarray(raw, np.uint8).reshape(N, -1)
    values = dequantize(raw, ggml_type)
    assert_same_bits(values, reference(raw, ggml_type))
    assert_same_bits(values, np.asarray(libgguf.dequantize_rows(raw, int(ggml_type), n_per_row=K)))


def test_every_finite_half_is_read_as_a_scale() -> None:
    raw = np.zeros((1, FINITE_HALVES.size, 34), np.uint8)
    raw[0, :, :2] = FINITE_HALVES.view(np.uint8).reshape(-1, 2)
    raw[0, :, 2:] = np.arange(32)
    raw = raw.reshape(1, -1)
    assert_same_bits(dequantize(raw, GGMLType.Q8_0), reference(raw, GGMLType.Q8_0))


@pytest.mark.parametrize(("ggml_type", "scales"), [(GGMLType.MXFP4, 1), (GGMLType.NVFP4, 4)], ids=["MXFP4", "NVFP4"])
def test_every_byte_is_read_as_an_fp4_scale_as_ggml_reads_it(ggml_type: GGMLType, scales: int) -> None:
    """E8M0 from 2^-128, a subnormal number, to 2^127, whose double is infinite; UE4M3 with its NaN, read as 0."""
    elements, size = BLOCK_SIZES[ggml_type]
    raw = np.zeros((256, size), np.uint8)
    raw[:, :scales] = np.arange(256)[:, None]
    raw[:, scales:] = np.resize(np.arange(0, 256, 17), elements // 2)  # every code, in both nibbles
    values = dequantize(raw, ggml_type)
    assert_same_bits(values, reference(raw, ggml_type))
    if ggml_type is GGMLType.MXFP4:
        assert values[[0, 1, 2, 254, 255], 1].tolist() == [2.0**-128, 2.0**-127, 2.0**-126, 2.0**126, 2.0**127]
        assert values[255, 2] == np.inf
    else:
        assert not values[127].any()


@pytest.mark.parametrize("ggml_type", sorted(SUPPORTED_TYPES), ids=named)
def test_a_slice_of_rows_decodes_as_it_does_in_the_whole(ggml_type: GGMLType) -> None:
    raw = random_rows(ggml_type, rows=9, blocks=3, seed=4)
    raw.flags.writeable = False  # as a mapped file's
    np.testing.assert_array_equal(dequantize(raw[4:7], ggml_type), dequantize(raw, ggml_type)[4:7])
    assert dequantize(raw[:0], ggml_type).shape == (0, 3 * BLOCK_SIZES[ggml_type].elements)


@pytest.mark.parametrize("ggml_type", sorted(SUPPORTED_TYPES), ids=named)
def test_results_do_not_alias_the_file(ggml_type: GGMLType) -> None:
    raw = random_rows(ggml_type, rows=1, blocks=1)
    assert not np.shares_memory(dequantize(raw, ggml_type), raw)
    if ggml_type not in FLOAT_TYPES:
        grouped = decode(raw, ggml_type)
        factors = [part for part in (grouped.scales, grouped.mins) if part is not None]
        for part in (grouped.codes, *(part.values for part in factors), *(part.supers for part in factors)):
            assert part is None or not np.shares_memory(part, raw)


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00], ids=["infinity", "-infinity", "nan"])
@pytest.mark.parametrize("ggml_type", WITH_HALVES, ids=named)
def test_damaged_scales_give_nan_as_in_ggml_and_no_warning(ggml_type: GGMLType, bits: int) -> None:
    raw = random_rows(ggml_type, rows=2, blocks=4).reshape(2, 4, -1)
    raw[0] = 0  # infinity × 0 where a type multiplies scales, too
    put_halves(raw, ggml_type, np.full((2, 4, 2), bits, np.uint16).view(np.float16))
    raw = raw.reshape(2, -1)
    np.testing.assert_array_equal(dequantize(raw, ggml_type), reference(raw, ggml_type))
    assert not np.isfinite(decode(raw, ggml_type).scales.flat()).any()


def test_threads_that_need_a_grid_at_once_all_get_it() -> None:
    raw = random_rows(GGMLType.IQ2_S, rows=64, blocks=16)
    expected = dequantize(raw, GGMLType.IQ2_S)
    ggml_grids.grid.cache_clear()
    ggml_grids.signs.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda start: dequantize(raw[start : start + 8], GGMLType.IQ2_S), range(0, 64, 8))
        assert_same_bits(np.concatenate(list(parts)), expected)


@pytest.mark.parametrize("function", [decode, dequantize])
def test_a_type_without_decoder_is_refused_by_name(function) -> None:
    with pytest.raises(UnsupportedModelError, match=r"F32, F16, Q4_0.*Q6_K, IQ2_XXS.*BF16, TQ1_0.*Q2_0, got 'Q8_K'"):
        function(np.zeros((1, 292), np.uint8), GGMLType.Q8_K)


def test_ids_and_block_sizes_are_those_of_gguf() -> None:
    for theirs, size in gguf.GGML_QUANT_SIZES.items():
        assert GGMLType(theirs).name == theirs.name
        if theirs.name != "Q8_1":  # the package counts two f32 where ggml-common.h has two f16; no file holds it
            assert BLOCK_SIZES[GGMLType(theirs)] == size
    assert BLOCK_SIZES.keys() == set(GGMLType)
