"""What `GROUP_FORMATS` says of each ggml type before it is read: true of what is decoded, narrow, and as documented."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from atoma_jax.quant.ggml import GROUP_FORMATS, decode
from atoma_jax.quant.ggml_types import BLOCK_SIZES, GGMLType
from atoma_jax.quant.groups import BF16, F16, I8, Factors, GroupFormat
from atoma_jax.quant.merging import widened
from atoma_jax.quant.qtensor import planar_width
from tests.quant.ggml_samples import GROUPED, assert_same_bits, random_rows, reference

DOCUMENT = Path(__file__).parents[2] / "docs" / "formats.md"


def spread(factors: Factors, grouping: GroupFormat) -> np.ndarray:
    """One f32 an element, computed apart from `Factors.flat`."""
    values = factors.values.astype(np.float32)
    if factors.supers is not None:
        assert grouping.supergroup is not None
        values *= factors.supers.repeat(grouping.supergroup // grouping.group, axis=1)
    return values.repeat(grouping.group, axis=1)


@pytest.mark.parametrize("ggml_type", GROUPED, ids=lambda t: t.name)
def test_decode_returns_what_its_formula_promises(ggml_type: GGMLType) -> None:
    raw = random_rows(ggml_type, rows=5, blocks=6, seed=2)
    grouped, expected = decode(raw, ggml_type), reference(raw, ggml_type)
    grouping = GROUP_FORMATS[ggml_type]
    assert grouped.format is grouping
    assert grouped.codes.shape == expected.shape
    assert grouped.codes.dtype == np.uint8
    assert grouped.codes.max() < 2**grouping.bits
    numbers = grouped.codes.astype(np.int32) - grouping.zero
    if grouping.table is not None:
        numbers = np.array(grouping.table)[grouped.codes]
    np.testing.assert_array_equal(grouped.signed(), numbers)
    with np.errstate(over="ignore"):  # MXFP4 of the largest scale
        values = spread(grouped.scales, grouping) * numbers.astype(np.float32)
    if grouped.mins is not None:
        values -= spread(grouped.mins, grouping)
    assert_same_bits(values, expected)


@pytest.mark.parametrize("ggml_type", GROUPED, ids=lambda t: t.name)
def test_factors_have_the_declared_shapes_and_types(ggml_type: GGMLType) -> None:
    grouping = GROUP_FORMATS[ggml_type]
    elements = BLOCK_SIZES[ggml_type].elements
    grouped = decode(random_rows(ggml_type, rows=2, blocks=3), ggml_type)
    assert elements % grouping.group == 0
    assert (grouped.mins is not None) == grouping.has_mins
    for factors, declared in ((grouped.scales, grouping.scale_dtype), (grouped.mins, grouping.min_dtype)):
        if factors is None:
            continue
        assert factors.values.shape == (2, 3 * elements // grouping.group)
        assert factors.values.dtype == (np.int8 if declared == I8 else np.float32)
        if grouping.supergroup is None:
            assert factors.supers is None
        else:
            assert factors.supers is not None
            assert factors.supers.shape == (2, 3 * elements // grouping.supergroup)
            assert factors.supers.dtype == np.float32


@pytest.mark.parametrize("ggml_type", GROUPED, ids=lambda t: t.name)
def test_a_table_has_a_number_for_each_code_and_each_fits_a_byte(ggml_type: GGMLType) -> None:
    grouping = GROUP_FORMATS[ggml_type]
    if grouping.table is not None:
        assert len(grouping.table) == 2**grouping.bits
        assert all(-128 <= number <= 127 for number in grouping.table)


@pytest.mark.parametrize("ggml_type", GROUPED, ids=lambda t: t.name)
def test_scale_dtype_is_the_narrowest_that_is_exact(ggml_type: GGMLType) -> None:
    grouping = GROUP_FORMATS[ggml_type]
    grouped = decode(random_rows(ggml_type, rows=16, blocks=16, seed=3), ggml_type)
    factors = [part.flat() for part in (grouped.scales, grouped.mins) if part is not None]

    def exact_in(dtype: np.dtype) -> bool:
        with np.errstate(over="ignore"):
            return all(np.array_equal(values, values.astype(dtype).astype(np.float32)) for values in factors)

    if grouping.scale_dtype == I8:  # wider than 16 bits, were it not for the supers
        assert not exact_in(F16)
        assert not exact_in(BF16)
    elif grouping.scale_dtype == BF16:
        assert exact_in(BF16)
        assert not exact_in(F16)
    else:
        assert grouping.scale_dtype == F16
        assert exact_in(F16)
    assert grouping.min_dtype in (None, grouping.scale_dtype)


@pytest.mark.parametrize("ggml_type", GROUPED, ids=lambda t: t.name)
def test_decoding_takes_no_more_than_three_bytes_an_element(ggml_type: GGMLType) -> None:
    raw = random_rows(ggml_type, rows=64, blocks=4096 // BLOCK_SIZES[ggml_type].elements)
    decode(raw[:1], ggml_type)  # grids are read once
    tracemalloc.start()
    grouped = decode(raw, ggml_type)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 3 * grouped.codes.size


# Bits a weight


def file_bits(ggml_type: GGMLType) -> float:
    elements, size = BLOCK_SIZES[ggml_type]
    return 8 * size / elements


def family(grouping: GroupFormat) -> str:
    if grouping.table is not None:
        return "W4 codebook"
    return {2: "W2", 4: "W4 affine", 8: "W8"}[planar_width(grouping.bits)]


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "MXFP4", "TQ2_0"])
def test_common_types_stay_within_12_percent_of_their_file(name: str) -> None:
    ggml_type = GGMLType[name]
    assert GROUP_FORMATS[ggml_type].packed_bits <= 1.12 * file_bits(ggml_type)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_ternary_types_take_no_more_than_two_and_a_quarter_bits(name: str) -> None:
    assert GROUP_FORMATS[GGMLType[name]].packed_bits <= 2.25


def test_packed_bits_count_codes_scales_mins_and_supers() -> None:
    assert GroupFormat(bits=8, group=32).packed_bits == 8 + 32 / 32
    assert GroupFormat(bits=4, group=16, scale_dtype=F16, min_dtype=F16).packed_bits == 4 + 16 / 16 + 16 / 16
    two_levels = GroupFormat(bits=4, group=32, scale_dtype=I8, min_dtype=I8, supergroup=256)
    assert two_levels.packed_bits == 4 + 8 / 32 + 8 / 32 + 2 * 32 / 256


def test_the_document_says_what_is_computed() -> None:
    lines = [line.strip("| \n").split(" | ") for line in DOCUMENT.read_text(encoding="utf-8").splitlines()]
    rows = {
        cells[0].strip(): [cell.strip() for cell in cells[1:]]
        for cells in lines
        if cells[0].strip() in GGMLType.__members__
    }
    assert list(rows) == [t.name for t in GROUP_FORMATS]
    for name, cells in rows.items():
        grouping = GROUP_FORMATS[GGMLType[name]]
        stored = file_bits(GGMLType[name])
        expected = [str(grouping.group), f"{stored:g}", family(grouping)]
        for packed in (widened(grouping, planar_width(grouping.bits)).packed_bits, grouping.packed_bits):
            expected += [f"{packed:g}", f"{packed / stored - 1:+.0%}"]
        assert cells == expected
