"""Activations as kernels take them: how far from what they stand for, in which order, and that no row harms another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.activations import (
    FIELDS,
    IN_ORDER,
    GatedRows,
    InFields,
    InPairs,
    InSpans,
    NormedRows,
    activations,
)
from pallas_kernels.quantized_matmul import quantize_tokens
from tests.pallas_kernels.products import made, numbers


@settings(max_examples=20, deadline=None)
@given(
    span=st.sampled_from([16, 32, 128]), seed=st.integers(0, 99), scale=st.integers(-20, 20), outlier=st.integers(0, 9)
)
def test_a_span_is_rounded_to_what_its_largest_allows(span: int, seed: int, scale: int, outlier: int):
    x = np.random.default_rng(seed).standard_normal((2, 3 * span)).astype(np.float32) * np.float32(2.0**scale)
    x[0, seed % span] *= 2.0**outlier
    found = made(x, InSpans(span))
    largest = np.abs(x).reshape(2, 3, span).max(axis=2)
    bound = np.repeat(2.0 ** (np.floor(np.log2(largest)) + 1) * 2.0**-15, span, axis=1)
    assert (np.abs(numbers(found, span) - x) <= bound).all()
    high, low = np.asarray(found.codes, np.int64)
    want = ((256 * high + low).reshape(2, 3, span).sum(axis=2) * np.asarray(found.unit, np.float64).T).T
    np.testing.assert_array_equal(found.total, want.astype(np.float32))


def test_whole_numbers_of_fourteen_bits_and_bfloat16_of_like_size_stay_what_they_are():
    rng = np.random.default_rng(0)
    whole = rng.integers(-(2**13), 2**13, (3, 64), endpoint=True).astype(np.float32)
    bfloat16 = np.asarray(jnp.asarray(rng.uniform(1, 63, (3, 64)), jnp.bfloat16), np.float32)
    for x in (whole, bfloat16, np.zeros((3, 64), np.float32)):
        np.testing.assert_array_equal(numbers(made(x, InSpans(32)), 32), x)


def test_what_is_too_small_for_a_unit_counts_as_zero_or_nearly_so():
    x = np.full((1, 32), 1e-40, np.float32)
    assert np.abs(numbers(made(x, InSpans(32)), 32)).max() <= 1e-35


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_span_that_holds_no_finite_number_shows_it_and_no_other_does(odd: float):
    x = np.ones((2, 96), np.float32)
    x[1, 40] = odd
    found = made(x, InSpans(32))
    is_odd = np.zeros((3, 2), bool)
    is_odd[1, 1] = True
    np.testing.assert_array_equal(np.isnan(found.unit), is_odd)
    np.testing.assert_array_equal(np.isnan(found.total), is_odd)


@pytest.mark.parametrize(("M", "K", "plane"), [(1, 512, 64), (3, 768, 32), (2, 384, 16)])
def test_fields_are_the_tokens_of_plain_xla_in_another_order(M: int, K: int, plane: int):
    x = jnp.asarray(np.random.default_rng(K).standard_normal((M, K)), jnp.bfloat16)
    codes, factor = quantize_tokens(x)
    found = made(x, InFields(plane))
    in_order = np.asarray(codes).reshape(M, -1, 2, FIELDS, plane).transpose(0, 1, 3, 4, 2).reshape(M, K)
    np.testing.assert_array_equal(found.codes, in_order)
    np.testing.assert_allclose(found.factor, factor[:, 0], rtol=2.0**-23)  # XLA makes one quotient of two, or not
    np.testing.assert_array_equal(found.total, np.asarray(codes, np.int64).sum(axis=1))


FORMS = (InSpans(32), InFields(16), InPairs(32, 4), IN_ORDER)


def in_order(found, form) -> np.ndarray:
    """Numbers of some rows, in the order of inputs."""
    if isinstance(form, InSpans):
        return numbers(found, form.span)
    if isinstance(form, InFields):
        rows = np.asarray(found.codes, np.float64) / (1 / np.asarray(found.factor, np.float64))[:, None]
        cut = rows.reshape(len(rows), -1, FIELDS, form.plane, 2)
        return cut.transpose(0, 1, 4, 2, 3).reshape(len(rows), -1)
    rows = np.asarray(found.astype(jnp.float32), np.float64)
    return rows.reshape(len(rows), -1, form.plane // 2, form.together, 2).swapaxes(2, 3).reshape(len(rows), -1)


def allowed(want: np.ndarray, form) -> np.ndarray:
    """How far a form may be from numbers that float32 rounded on their way."""
    if isinstance(form, InSpans):
        largest = np.abs(want).reshape(len(want), -1, form.span).max(axis=2)
        return np.repeat(largest * 2.0**-14, form.span, axis=1)
    if isinstance(form, InFields):
        return np.abs(want).max(axis=1, keepdims=True) * 0.502 / 127
    return np.abs(want) * 2.0**-8


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("K", [256, 384])  # a power of two, and not
def test_rows_are_added_up_and_normalized_on_the_way(form, parts, K):
    rng = np.random.default_rng(K)
    x, more = rng.standard_normal((3, K)).astype(np.float32), rng.standard_normal((parts, 3, K)).astype(np.float32)
    scales, eps = rng.uniform(0.5, 2, (2, K)).astype(np.float32), 1e-2
    added = jnp.asarray(more) if parts else None
    source = NormedRows(jnp.asarray(x), added, jnp.asarray(scales), jnp.int32(1), eps)
    found = jax.jit(lambda: activations(source, form, interpret=True))()
    total = x.astype(np.float64) + more.sum(axis=0, dtype=np.float64)
    want = total / np.sqrt((total**2).mean(axis=1, keepdims=True) + eps) * scales[1]
    assert (np.abs(in_order(found.inputs, form) - want) <= allowed(want, form)).all()
    assert (found.total is None) == (parts == 0)
    if parts:
        np.testing.assert_allclose(found.total, total, rtol=1e-5, atol=1e-6)


GATES = {
    "silu": (jax.nn.silu, lambda x: x / (1 + np.exp(-x))),
    "gelu_tanh": (jax.nn.gelu, lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))),
    "relu_squared": (lambda x: jnp.square(jax.nn.relu(x)), lambda x: np.maximum(x, 0) ** 2),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("gate", GATES)
def test_gates_and_ups_are_added_up_and_multiplied_on_the_way(form, parts, gate):
    activate, by_float64 = GATES[gate]
    sums = np.random.default_rng(parts).standard_normal((parts, 3, 2 * 384)).astype(np.float32)
    found = jax.jit(lambda: activations(GatedRows(jnp.asarray(sums), activate), form, interpret=True))()
    gates, ups = np.split(sums.sum(axis=0, dtype=np.float64), 2, axis=1)
    want = by_float64(gates) * ups
    assert found.total is None
    assert (np.abs(in_order(found.inputs, form) - want) <= allowed(want, form)).all()


def test_a_row_that_holds_nan_is_normalized_alone():
    x = np.ones((2, 64), np.float32)
    x[1, 7] = np.nan
    source = NormedRows(jnp.asarray(x), None, jnp.ones((1, 64)), jnp.int32(0), 0.0)
    found = activations(source, InSpans(32), interpret=True)
    np.testing.assert_array_equal(np.isnan(found.inputs.unit), [[False, True], [False, True]])
