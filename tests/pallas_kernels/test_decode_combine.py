"""Attention put together from its parts, interpreted, is that of float64; in the form of a product it is what that form
makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.activations import IN_ORDER, InFields, InPairs, InSpans, Rows, activations
from pallas_kernels.decode_combine import COMBINED_AT_ONCE, DecodedParts, can_write, combined, combined_activations
from tests.pallas_kernels.products import numbers

N = 4
PARTS = (1, 2, COMBINED_AT_ONCE, 2 * COMBINED_AT_ONCE + 3, 1)  # of rows; the first has no context


def decoded(H: int, tokens: int = len(PARTS)) -> DecodedParts:
    """Random parts. What belongs to no part is NaN, and rows of several parts are, where they are not to be read."""
    rng, count = np.random.default_rng(H), np.asarray(PARTS)
    first = np.concatenate([[0], np.cumsum(count)[:-1]])
    items = int(count.sum()) + 3
    acc, largest, total = (np.full((items, N, *rest), np.nan, np.float32) for rest in ((H,), (), ()))
    used = np.flatnonzero(np.repeat(count > 1, count))
    acc[used] = rng.standard_normal((len(used), N, H))
    largest[used], total[used] = rng.uniform(-20, 20, (len(used), N)), rng.uniform(1, 9, (len(used), N))
    out = rng.standard_normal((tokens, N, H)).astype(np.float32)
    out[: len(PARTS)][count > 1] = np.nan
    out[0] = 0
    rows = np.stack([first, count], axis=1).astype(np.int32)
    return DecodedParts(*map(jnp.asarray, (rows, acc, largest, total, out)))


def by_float64(parts: DecodedParts) -> np.ndarray:
    rows, acc, largest, total, out = (np.asarray(array, np.float64) for array in parts)
    for row, (first, count) in enumerate(rows.astype(int)):
        if count > 1:
            of_row = slice(first, first + count)
            weight = np.exp2(largest[of_row] - largest[of_row].max(axis=0))
            out[row] = (acc[of_row] * weight[..., None]).sum(axis=0) / (total[of_row] * weight).sum(axis=0)[:, None]
    return out


@pytest.mark.parametrize("H", [64, 80, 96])
def test_rows_of_one_part_stay_and_others_are_put_together(H):
    parts = decoded(H)
    got = jax.jit(lambda: combined(parts, interpret=True))()
    np.testing.assert_allclose(got, by_float64(parts), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("H", "span"), [(64, 32), (80, 16), (96, 32)])
def test_in_spans_it_is_rounded_by_what_the_largest_of_a_span_allows(H, span):
    parts, want = decoded(H), by_float64(decoded(H)).reshape(len(PARTS), N * H)
    assert can_write(parts, InSpans(span))
    found = jax.jit(lambda: combined_activations(parts, InSpans(span), interpret=True))()
    largest = np.repeat(np.abs(want).reshape(len(PARTS), -1, span).max(axis=2), span, axis=1)
    assert (np.abs(numbers(found, span) - want) <= largest * 2.0**-13).all()
    sums = np.asarray(found.total, np.float64).T
    np.testing.assert_allclose(sums, numbers(found, span).reshape(len(PARTS), -1, span).sum(axis=2), rtol=1e-6)


@pytest.mark.parametrize("form", [IN_ORDER, InPairs(16, 4), InPairs(32, 2)])
@pytest.mark.parametrize("H", [64, 80])
def test_in_bfloat16_it_lies_as_rows_of_that_form_do(H, form):
    parts = decoded(H)
    assert can_write(parts, form)
    rows = jnp.asarray(by_float64(parts).reshape(len(PARTS), N * H), jnp.float32)
    want = activations(Rows(rows), form, interpret=True).inputs.astype(jnp.float32)
    got = jax.jit(lambda: combined_activations(parts, form, interpret=True))().astype(jnp.float32)
    np.testing.assert_allclose(got, want, rtol=2.0**-7, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "tokens"),
    [(InSpans(64), 5), (InFields(16), 5), (IN_ORDER, 6)],
    ids=["spans beyond a head", "a token's largest is not a head's", "tokens that do not decode"],
)
def test_what_one_program_cannot_make_is_left_to_others(form, tokens):
    assert not can_write(decoded(80, tokens), form)
