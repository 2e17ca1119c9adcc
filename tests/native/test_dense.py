"""Products with dense weights: every variant of the kernel against float64, for every type that it reads."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atoma_jax.native import dense
from atoma_jax.native.library import Library
from tests.native.weights import activations

DTYPES = ("float32", "bfloat16", "float16")
ROW_COUNTS = (1, 2, 3, 4, 6, 7, 64)

product = jax.jit(partial(dense.matmul, may_round=False))
rounded_product = jax.jit(partial(dense.matmul, may_round=True))


def stack(dtype: str, N: int, K: int) -> jax.Array:
    """Two matrices, with numbers that float16 has no exponent for."""
    values = np.random.default_rng(3).standard_normal((2, N, K)).astype(np.float32)
    values[:, 0] *= 1e-6
    return jnp.asarray(values, dtype)


def error_of(y: jax.Array, x: jax.Array, weight: jax.Array) -> float:
    wanted = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    return float((np.abs(np.asarray(y) - wanted) / np.abs(wanted).max(axis=1, keepdims=True)).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(70, 512), (16, 64), (3, 70), (33, 5), (1, 1)])
def test_products_are_those_of_float64(variant: str, dtype: str, N: int, K: int) -> None:
    weight, x = stack(dtype, N, K), activations(8, K)
    for matrix in range(2):
        assert error_of(product(x, weight, matrix), x, weight[matrix]) < 2e-6
    np.testing.assert_array_equal(product(x, weight[1], 0), product(x, weight, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(70, 512), (16, 64), (3, 70), (33, 5)])
def test_rounded_products_are_those_of_rounded_activations(variant: str, dtype: str, N: int, K: int) -> None:
    weight, x = stack(dtype, N, K), activations(8, K)
    rounds = variant == "avx512-bf16" and dtype == "bfloat16"  # where there are instructions for it
    wanted = x.astype(jnp.bfloat16).astype(jnp.float32) if rounds else x
    assert error_of(rounded_product(x, weight, 1), wanted, weight[1]) < 2e-6
    y = rounded_product(x, weight, 0)
    for count in (1, 2, 5):
        np.testing.assert_array_equal(rounded_product(x[:count], weight, 0), y[:count])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_however_many_others_there_are(variant: str, dtype: str) -> None:
    weight, x = stack(dtype, 70, 100), np.asarray(activations(300, 100))  # more than a piece of work takes
    y = np.asarray(product(x, weight, 0))
    for count in ROW_COUNTS:
        np.testing.assert_array_equal(product(x[300 - count :], weight, 0), y[300 - count :])


def test_the_number_of_threads_does_not_show(kernels: Library) -> None:
    weight, x = stack("bfloat16", 500, 256), activations(300, 256)
    results = []
    for threads in (1, 2, 3, 8):
        with kernels.forced(threads=threads):
            results.append(np.asarray(product(x, weight, 0)))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_shows_it_and_no_other_does(variant: str, value: float) -> None:
    weight, x = stack("bfloat16", 70, 256), activations(6, 256)
    clean, y = (np.asarray(product(rows, weight, 0)) for rows in (x, x.at[2, 100].set(value)))
    assert not np.isfinite(y[2]).any()
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(y[others], clean[others])


def test_rows_that_fill_a_program_up_change_no_other_and_give_zeros(variant: str) -> None:
    weight, x = stack("float16", 70, 96), np.asarray(activations(5, 96))
    filled = np.concatenate([x[:2], np.zeros_like(x[:1]), x[2:], np.zeros_like(x), -np.zeros_like(x)])
    y = np.asarray(product(filled, weight, 0))
    np.testing.assert_array_equal(y[[0, 1, 3, 4, 5]], product(x, weight, 0))
    assert not y[2].any()
    assert not y[6:].any()


@pytest.mark.parametrize("index", [-1, 2])
def test_a_matrix_outside_the_stack_is_refused(kernels: Library, index: int) -> None:
    with pytest.raises(Exception, match="outside the stack"):
        jax.block_until_ready(product(activations(1, 64), stack("float16", 70, 64), index))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weight: weight.astype(jnp.int32), "f32, bf16 or f16"),
        (lambda weight: weight[..., :32], r"x must be \[rows, K\]"),
        (lambda weight: weight[:, :32], r"the product must be \[rows, N\]"),
        (lambda weight: weight[0, 0], r"must be \[..., N, K\]"),
    ],
    ids=["dtype", "inputs", "columns", "rank"],
)
def test_arrays_that_do_not_belong_together_are_refused(kernels: Library, change: Any, problem: str) -> None:
    call = jax.ffi.ffi_call("atoma_dense", jax.ShapeDtypeStruct((1, 70), jnp.float32))  # past the types of `matmul`
    weight = change(stack("float32", 70, 64))
    with pytest.raises(Exception, match=problem):
        jax.block_until_ready(call(activations(1, 64), weight, jnp.int32(0), may_round=np.bool_(False)))
