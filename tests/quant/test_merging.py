"""Any two formats meet in one that holds the values of both, bit for bit."""

import itertools

import numpy as np
import pytest

from atoma_jax.quant.ggml import GROUP_FORMATS, decode
from atoma_jax.quant.ggml_types import BLOCK_SIZES, GGMLType
from atoma_jax.quant.groups import F16, I8, GroupFormat
from atoma_jax.quant.merging import merged_format, recast, widened
from tests.quant.ggml_samples import GROUPED, put_halves

K = 512


def rows_of(kind: GGMLType, rows: int = 6):
    """Decoded random blocks, with scales of the size that quantizers choose."""
    size = BLOCK_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    blocks = rng.integers(0, 256, (rows, K // size.elements, size.bytes), dtype=np.uint8)
    put_halves(blocks, kind, rng.uniform(0.01, 1, (*blocks.shape[:2], 2)).astype(np.float16))
    if kind is GGMLType.MXFP4:
        blocks[..., 0] = rng.integers(110, 130, blocks.shape[:2])  # exponents of numbers that models hold
    if kind is GGMLType.NVFP4:
        blocks[..., :4] &= 0x6F
    return decode(blocks.reshape(rows, -1), kind)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(GROUPED, 2)), ids=lambda t: t.name)
def test_both_keep_their_exact_values(first: GGMLType, second: GGMLType) -> None:
    merged = merged_format([GROUP_FORMATS[first], GROUP_FORMATS[second]])
    assert merged is not None
    for kind in (first, second):
        weights = rows_of(kind)
        there = recast(weights, merged)
        assert there.format == merged
        assert there.codes.max() < 2**merged.bits
        assert (there.mins is not None) == merged.has_mins
        np.testing.assert_array_equal(there.values(), weights.values())


@pytest.mark.parametrize("kind", GROUPED, ids=lambda t: t.name)
def test_a_format_with_itself_is_itself(kind: GGMLType) -> None:
    weights = rows_of(kind)
    merged = merged_format([weights.format, weights.format])
    assert merged == weights.format
    assert recast(weights, weights.format) is weights


def test_floats_and_integers_do_not_meet() -> None:
    fp8 = GroupFormat(bits=8, group=K, float_codes=True)
    assert merged_format([fp8, GROUP_FORMATS[GGMLType.Q8_0]]) is None
    assert merged_format([fp8, fp8]) == fp8


def test_the_merged_format_is_no_wider_than_it_has_to_be() -> None:
    four = merged_format([GROUP_FORMATS[GGMLType.Q4_0], GROUP_FORMATS[GGMLType.Q4_1]])
    assert four == GroupFormat(bits=4, group=32, scale_dtype=F16, min_dtype=F16)
    five = merged_format([GROUP_FORMATS[GGMLType.Q4_0], GROUP_FORMATS[GGMLType.Q5_0]])
    assert five == GroupFormat(bits=5, group=32, zero=16, scale_dtype=F16)
    no_zero = merged_format([GROUP_FORMATS[GGMLType.Q5_0], GROUP_FORMATS[GGMLType.Q5_1]])
    assert no_zero == GroupFormat(bits=6, group=32, zero=16, scale_dtype=F16, min_dtype=F16)
    min_of_zero = merged_format([GROUP_FORMATS[GGMLType.Q3_K], GROUP_FORMATS[GGMLType.Q4_K]])
    assert min_of_zero == GroupFormat(bits=4, group=16, scale_dtype=I8, min_dtype=I8, supergroup=256)
    six = merged_format([GROUP_FORMATS[GGMLType.Q4_K], GROUP_FORMATS[GGMLType.Q6_K]])
    assert six == GroupFormat(bits=6, group=16, zero=32, scale_dtype=I8, min_dtype=I8, supergroup=256)


def test_wider_codes_keep_integer_scales_and_their_supers() -> None:
    weights = rows_of(GGMLType.Q6_K)
    wide = recast(weights, widened(weights.format, 8))
    assert wide.scales is weights.scales
    np.testing.assert_array_equal(wide.values(), weights.values())


def test_wider_codes_have_the_same_numbers() -> None:
    two = GROUP_FORMATS[GGMLType.TQ2_0]
    wide = widened(two, 4)
    assert (wide.bits, wide.group, wide.zero, wide.scale_dtype) == (4, two.group, two.zero, two.scale_dtype)
