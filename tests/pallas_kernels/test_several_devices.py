"""Under shard_map, on simulated devices, each kernel of products does its device's part: cut along K or along N."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from pallas_kernels.planar_weights import PlanarFormat, PlanarStack
from pallas_kernels.tuning import MatmulTiles
from tests.pallas_kernels.packed_weights import activations, index, packed
from tests.pallas_kernels.products import (
    dense_product,
    in_two_bytes,
    planar_grouped_product,
    planar_product,
    ternary_product,
)

TILES = MatmulTiles(block_n=32, block_m=16, splits=1, warps=4, stages=4)
FEW = replace(TILES, block_m=4)
Q4_0, TERNARY = PlanarFormat(4, 32, 32, 8, None), PlanarFormat(2, 32, 512, 1, None)
CUT_N = P(None, "tensor"), P(None, None, "tensor")  # words or rows of a stack, its scales


def on_two_devices(run: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    devices = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    # Pallas calls do not say over which axes their results vary.
    return jax.jit(jax.shard_map(run, mesh=devices, in_specs=in_specs, out_specs=out_specs, check_vma=False))


def test_whole_blocks_along_k_go_to_each_device_and_their_sums_are_added():
    w, x = packed(Q4_0, S=2, N=32, K=512), activations(3, 512)

    def local(x: jax.Array, stack: PlanarStack) -> jax.Array:
        return jax.lax.psum(planar_product(x, stack, index(1), Q4_0, FEW), "tensor")

    specs = PlanarStack(P(None, None, "tensor"), P(None, "tensor"), None, None, None)
    got = on_two_devices(local, (P(None, "tensor"), specs), P())(x, w.stack)
    np.testing.assert_allclose(got, in_two_bytes(x, Q4_0) @ w.values[1].T, rtol=1e-5, atol=2e-5)


def test_experts_weights_are_cut_along_their_out_features():
    w, x = packed(Q4_0, S=2, N=64, K=256), activations(20, 256)
    blocks = np.int32([1, 0]), np.int32([0, 7]), np.int32([7, 20])  # expert, first row, behind the last
    run = partial(planar_grouped_product, kind=Q4_0, tiles=FEW, most=16)
    specs = P(), PlanarStack(*CUT_N, None, None, None), P(), P(), P(), P()
    got = on_two_devices(run, specs, CUT_N[0])(x, w.stack, index(2), *blocks)
    x = in_two_bytes(x, Q4_0)
    want = np.concatenate([x[:7] @ w.values[1].T, x[7:] @ w.values[0].T])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


def test_ternary_weights_cut_along_n_give_the_bits_of_one_device():
    w, x = packed(TERNARY, S=2, N=64, K=512), activations(3, 512)
    run = partial(ternary_product, kind=TERNARY, tiles=TILES)
    arguments = jnp.asarray(x), w.stack.words, w.stack.scales, index(1)
    got = on_two_devices(run, (P(), *CUT_N, P()), CUT_N[0])(*arguments)
    np.testing.assert_array_equal(got, jax.jit(run)(*arguments))


def test_bfloat16_weights_cut_along_n():
    stack = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 128)), jnp.bfloat16)
    x = activations(3, 128)
    run = partial(dense_product, tiles=TILES)
    got = on_two_devices(run, (P(), CUT_N[0], P()), CUT_N[0])(x, stack, index(1))
    want = x.astype(np.float64) @ np.asarray(stack[1].astype(jnp.float32), np.float64).T
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
