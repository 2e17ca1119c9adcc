"""Products with one of a stack of bfloat16 weights are those of float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tuning import MatmulTiles, default_tiles
from tests.pallas_kernels.packed_weights import activations, index
from tests.pallas_kernels.products import dense_product


def test_at_and_off_the_borders_of_tiles():
    """17 rows of tiles of 16, 40 out-features of tiles of 32, 200 inputs of blocks of 64; a row of NaN stays alone."""
    tiles = MatmulTiles(block_n=32, block_m=16, splits=2, warps=4, stages=4)
    stack = jnp.asarray(np.random.default_rng(0).standard_normal((2, 40, 200)), jnp.bfloat16)
    x = activations(17, 200)
    x[16] = np.nan
    run = jax.jit(lambda x, stack, place: dense_product(x, stack, place, tiles))
    got = np.asarray(run(x, stack, index(1)))
    want = x.astype(np.float64) @ np.asarray(stack[1].astype(jnp.float32), np.float64).T
    np.testing.assert_allclose(got[:16], want[:16], rtol=1e-5, atol=1e-4)
    assert np.isnan(got[16]).all()


@pytest.mark.parametrize("M", [1, 4096])
def test_any_number_of_rows_in_the_tiles_that_are_the_default_for_it(M):
    tiles = default_tiles("dense_matmul", M=M, N=24, K=128, bits=16, group=1)
    stack = jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, 128)), jnp.bfloat16)
    x = activations(M, 128)
    got = jax.jit(lambda x, stack, place: dense_product(x, stack, place, tiles))(x, stack, index(1))
    want = x.astype(np.float64) @ np.asarray(stack[1].astype(jnp.float32), np.float64).T
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
