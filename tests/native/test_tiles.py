"""Packing rows into tiles: compiled and numpy's are the same bytes, wherever the rows go."""

import numpy as np
import pytest

from atoma_jax.native.library import Library
from atoma_jax.native.tiles import put_codes, put_codes_with_numpy, put_factors, put_factors_with_numpy

N, TILES = 70, 3
SCATTERED = np.random.default_rng(3).permutation(N)
ROWS = {
    "all": np.arange(N),
    "within a tile": np.arange(37, 50),
    "heads taken in turns": np.concatenate([np.arange(0, 16), np.arange(32, 48)]),
    "scattered": SCATTERED[:41],
    "none": np.arange(0),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("K", [64, 80, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_compiled_codes_are_those_of_numpy(kernels: Library, bits: int, K: int, rows: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, (len(rows), K), dtype=np.uint8)
    blocks = -(-K // 32)
    outs = [np.zeros((TILES, blocks, 128 * bits), np.uint8) for _ in range(2)]
    put_codes(codes, bits, rows, outs[0])
    put_codes_with_numpy(codes, bits, rows, outs[1])
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32])
def test_compiled_factors_are_those_of_numpy(kernels: Library, dtype: type, rows: np.ndarray) -> None:
    factors = np.random.default_rng(0).uniform(-60, 60, (len(rows), 5)).astype(dtype)
    outs = [np.full((TILES, 6, 32), 7, dtype) for _ in range(2)]
    put_factors(factors, rows, outs[0])
    put_factors_with_numpy(factors, rows, outs[1])
    np.testing.assert_array_equal(*outs)


def test_floats_are_rounded_to_the_type_that_holds_them(kernels: Library) -> None:
    factors = np.random.default_rng(0).uniform(0, 1, (32, 4)).astype(np.float32)
    out = np.zeros((1, 4, 32), np.float16)
    put_factors(factors, slice(0, 32), out)
    np.testing.assert_array_equal(out[0].T, factors.astype(np.float16))


def test_rows_that_the_weight_does_not_have_are_not_written() -> None:
    with pytest.raises(AssertionError):
        put_codes(np.zeros((1, 32), np.uint8), 4, np.array([96]), np.zeros((3, 1, 512), np.uint8))
    with pytest.raises(AssertionError):
        put_factors(np.zeros((1, 1), np.float32), np.array([-1]), np.zeros((3, 1, 32), np.float32))
