"""Pallas's products put together as a layer does, interpreted: what one leaves to be added up, normalized or gated, the
next one's activations take in. Beside float64."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atoma_jax import ops
from atoma_jax.quant.qtensor import LayerVariants, QTensor
from pallas_kernels.planar_weights import PlanarFormat
from sharding.mesh import MeshShape
from tests.pallas_kernels.packed_weights import packed

BACKEND = ops.Backend(platform="cpu", operands="bfloat16", weight_layout="planar", kernels="interpret")
D, F, LAYERS = 128, 256, 2
Q4_0 = PlanarFormat(4, 32, 32, 8, None)


def weight(kind: str, N: int, K: int):
    """A stack, and its values."""
    if kind == "bf16":
        stack = jnp.asarray(np.random.default_rng(N).standard_normal((LAYERS, N, K)) * 0.1, jnp.bfloat16)
        return stack, np.asarray(stack.astype(jnp.float32), np.float64)
    group = K if kind == "ternary" else 32
    form = PlanarFormat(2, 16, group, 1, None) if kind == "ternary" else Q4_0
    w = packed(form, S=LAYERS, N=N, K=K)
    stack = QTensor(
        codes=w.stack.words,
        scales=w.stack.scales,
        mins=None,
        scale_supers=None,
        min_supers=None,
        permutation=None,
        layout="planar",
        shape=(N, K),
        group=group,
        bits=form.bits,
        zero=form.zero,
        table=None,
        plane=form.plane,
    )
    return stack, w.values


def normed(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps) * scale


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@partial(jax.jit, static_argnames=("int8", "backend"))
def half_a_layer(x, a, attn_out, scales, up, down, *, int8, backend=BACKEND):
    """What attention gives, projected and added; then a gated net, added."""
    layer, what = jnp.int32(1), {"int8_activations": int8}
    y = ops.linear_of_parts(a, attn_out, backend, width=D, layer=layer, residual=x, **what)
    assert isinstance(y, ops.Added)
    h = ops.Normed(y, scales, layer, 1e-5)
    z = ops.net_of_stream(h, up, down, "silu", backend, tokens=x.shape[0], layer=layer, residual=y, **what)
    return ops.computed(y, backend), z


@pytest.mark.parametrize("rows", [1, 4, 16, 130])  # sums scaled, weights scaled, weights dequantized first
@pytest.mark.parametrize("kind", ["Q4_0", "bf16", "ternary"])
def test_half_a_layer_is_that_of_float64(kind, rows):
    rng = np.random.default_rng(rows)
    x, a = rng.standard_normal((2, rows, D)).astype(np.float32)
    scales = rng.uniform(0.5, 1.5, (LAYERS, D)).astype(np.float32)
    (attn_out, A), (up, U), (down, W) = (weight(kind, *shape) for shape in ((D, D), (2 * F, D), (D, F)))
    stream, out = half_a_layer(x, a, attn_out, scales, up, down, int8=kind == "ternary")

    total = x.astype(np.float64) + a @ A[1].T
    gate, ups = np.split(normed(total, scales[1], 1e-5) @ U[1].T, 2, axis=1)
    want = total + (silu(gate) * ups) @ W[1].T
    few = kind == "Q4_0" and rows <= 4
    allowed = {"ternary": 2e-2, "bf16": 1e-2, "Q4_0": 2e-4 if few else 2e-2}[kind]  # of the largest, twice rounded
    assert np.abs(np.asarray(stream) - total).max() <= allowed * np.abs(total).max()
    assert np.abs(np.asarray(out) - want).max() <= allowed * np.abs(want).max()


def test_devices_that_share_no_weights_do_as_one_does():
    """Nothing is exchanged: no `shard_map` is needed."""
    x, a = np.random.default_rng(0).standard_normal((2, 1, D)).astype(np.float32)
    arguments = (x, a, *(weight("Q4_0", D, D)[:1]), np.ones((LAYERS, D), np.float32))
    nets = weight("Q4_0", 2 * F, D)[0], weight("Q4_0", D, F)[0]
    mesh = replace(BACKEND, mesh=MeshShape(data=2))
    alone, among = (half_a_layer(*arguments, *nets, int8=False, backend=backend) for backend in (BACKEND, mesh))
    np.testing.assert_array_equal(alone[1], among[1])


def test_a_product_that_is_added_to_something_leaves_the_sum_to_who_reads_it():
    stack, values = weight("bf16", D, D)
    x = np.random.default_rng(0).standard_normal((3, D)).astype(np.float32)
    y = ops.linear_of_parts(jnp.asarray(x), stack, BACKEND, width=D, layer=jnp.int32(0), residual=jnp.asarray(x))
    assert isinstance(y, ops.Added)
    assert y.shape == (3, D)
    np.testing.assert_allclose(ops.computed(y, BACKEND), x + x @ values[0].T, rtol=2e-2, atol=2e-2)


def test_variants_of_a_layer_add_up_themselves_as_their_parts_differ_in_number():
    stack, values = weight("bf16", D, D)
    packed_stack, packed_values = weight("Q4_0", D, D)
    variants = LayerVariants(stacks=(stack, packed_stack), which=(0, 1), place=(0, 1))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, D)), jnp.float32)
    run = jax.jit(lambda layer: ops.linear_of_parts(x, variants, BACKEND, width=D, layer=layer, residual=x))
    for layer, w in enumerate((values[0], packed_values[1])):
        np.testing.assert_allclose(run(jnp.int32(layer)), x + x @ w.T, rtol=2e-2, atol=2e-2)
