"""Activations as whole numbers: how far from what they were, in which order, and that no row harms another."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.quantized_matmul import quantize_tokens
from pallas_kernels.quantized_tokens import FIELDS, SpanBytes, field_tokens, span_bytes


def values(found: SpanBytes, span: int) -> np.ndarray:
    high, low = np.asarray(found.codes, np.float64)
    return (256 * high + low) * np.repeat(np.asarray(found.unit, np.float64).T, span, axis=1)


@settings(max_examples=20, deadline=None)
@given(
    span=st.sampled_from([16, 32, 128]), seed=st.integers(0, 99), scale=st.integers(-20, 20), outlier=st.integers(0, 9)
)
def test_a_span_is_rounded_to_what_its_largest_allows(span: int, seed: int, scale: int, outlier: int):
    x = np.random.default_rng(seed).standard_normal((2, 3 * span)).astype(np.float32) * np.float32(2.0**scale)
    x[0, seed % span] *= 2.0**outlier
    found = span_bytes(jnp.asarray(x), span, interpret=True)
    largest = np.abs(x).reshape(2, 3, span).max(axis=2)
    bound = np.repeat(2.0 ** (np.floor(np.log2(largest)) + 1) * 2.0**-15, span, axis=1)
    assert (np.abs(values(found, span) - x) <= bound).all()
    high, low = np.asarray(found.codes, np.int64)
    want = ((256 * high + low).reshape(2, 3, span).sum(axis=2) * np.asarray(found.unit, np.float64).T).T
    np.testing.assert_array_equal(found.total, want.astype(np.float32))


def test_whole_numbers_of_fourteen_bits_and_bfloat16_of_like_size_stay_what_they_are():
    rng = np.random.default_rng(0)
    whole = rng.integers(-(2**13), 2**13, (3, 64), endpoint=True).astype(np.float32)
    bfloat16 = np.asarray(jnp.asarray(rng.uniform(1, 63, (3, 64)), jnp.bfloat16), np.float32)
    for x in (whole, bfloat16, np.zeros((3, 64), np.float32)):
        np.testing.assert_array_equal(values(span_bytes(jnp.asarray(x), 32, interpret=True), 32), x)


def test_what_is_too_small_for_a_unit_counts_as_zero_or_nearly_so():
    x = np.full((1, 32), 1e-40, np.float32)
    assert np.abs(values(span_bytes(jnp.asarray(x), 32, interpret=True), 32)).max() <= 1e-35


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_span_that_holds_no_finite_number_shows_it_and_no_other_does(odd: float):
    x = np.ones((2, 96), np.float32)
    x[1, 40] = odd
    found = span_bytes(jnp.asarray(x), 32, interpret=True)
    is_odd = np.zeros((3, 2), bool)
    is_odd[1, 1] = True
    np.testing.assert_array_equal(np.isnan(found.unit), is_odd)
    np.testing.assert_array_equal(np.isnan(found.total), is_odd)


@pytest.mark.parametrize(("M", "K", "plane"), [(1, 512, 64), (3, 768, 32), (2, 384, 16)])
def test_fields_are_the_tokens_of_plain_xla_in_another_order(M: int, K: int, plane: int):
    x = jnp.asarray(np.random.default_rng(K).standard_normal((M, K)), jnp.bfloat16)
    codes, factor = quantize_tokens(x)
    found = field_tokens(x, plane, interpret=True)
    in_order = np.asarray(codes).reshape(M, -1, 2, FIELDS, plane).transpose(0, 1, 3, 4, 2).reshape(M, K)
    np.testing.assert_array_equal(found.codes, in_order)
    np.testing.assert_allclose(found.factor, factor[:, 0], rtol=2.0**-23)  # XLA makes one quotient of two, or not
    np.testing.assert_array_equal(found.total, np.asarray(codes, np.int64).sum(axis=1))
