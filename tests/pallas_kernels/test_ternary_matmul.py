"""Sums of ternary weights × int8 activations are exact, and the same in the kernel and in plain XLA."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.planar_weights import PlanarFormat
from pallas_kernels.quantized_matmul import pack_planar, quantize_tokens
from pallas_kernels.ternary_matmul import ternary_matmul_xla
from pallas_kernels.tuning import MatmulTiles, default_tiles
from tests.pallas_kernels.packed_weights import index, packed
from tests.pallas_kernels.products import ternary_product

SHAPE = {"N": 40, "K": 512, "bits": 2, "group": 512}


def tiles(block_m: int, splits: int) -> MatmulTiles:
    return MatmulTiles(block_n=32, block_m=block_m, splits=splits, warps=4, stages=4)


@pytest.mark.parametrize(
    ("M", "N", "K", "plane", "cut"),
    [
        (17, 40, 768, 32, tiles(16, 2)),
        (70, 40, 512, 64, tiles(64, 1)),
        *((M, 40, 512, 64, default_tiles("ternary_matmul", **SHAPE, M=M)) for M in (1, 4096)),
    ],
)
def test_the_kernel_is_bit_equal_to_xla_and_exact(M, N, K, plane, cut):
    w = packed(PlanarFormat(2, plane, K, 1, None), S=2, N=N, K=K)
    x = np.random.default_rng(M).standard_normal((M, K)).astype(np.float32)
    run = jax.jit(partial(ternary_product, kind=w.kind, tiles=cut))
    got = np.asarray(run(x, w.stack.words, w.stack.scales, index(1)))
    twin = jax.jit(partial(ternary_matmul_xla, kind=w.kind))(x, w.stack.words[1], w.stack.scales[1])
    np.testing.assert_array_equal(got, np.asarray(twin))
    tokens, factor = (np.asarray(part, np.float64) for part in quantize_tokens(jnp.asarray(x)))
    np.testing.assert_allclose(got, tokens @ w.values[1].T * factor, rtol=1e-6, atol=0)


def test_the_largest_sums_are_exact():
    """Every product is ±127, all of one sign in a sum: odd numbers beyond what bfloat16 or float16 would hold."""
    K = 1536
    kind = PlanarFormat(2, 32, K, 1, None)
    signs = np.where(np.arange(16) % 2, 1, -1)[:, None]
    words = np.stack([pack_planar(np.broadcast_to(1 + signs, (16, K)).astype(np.uint8), 2, 32)])
    run = jax.jit(partial(ternary_product, kind=kind, tiles=tiles(16, 1)))
    got = run(jnp.full((3, K), 127.0), jnp.asarray(words), jnp.ones((1, 1, 16)), index(0))
    np.testing.assert_array_equal(got, np.broadcast_to(127.0 * K * signs[:, 0], (3, 16)))


def test_a_row_that_holds_nan_or_infinity_stays_alone():
    w = packed(PlanarFormat(2, 32, 512, 1, None), S=1, N=32, K=512)
    x = np.ones((4, 512), np.float32)
    x[1, 7], x[2, 9] = np.nan, np.inf
    run = jax.jit(partial(ternary_product, kind=w.kind, tiles=tiles(16, 1)))
    got = np.asarray(run(jnp.asarray(x), w.stack.words, w.stack.scales, index(0)))
    assert np.isnan(got[[1, 2]]).all()
    assert np.isfinite(got[[0, 3]]).all()
