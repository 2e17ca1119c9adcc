"""Products that `ops` chooses: activations of eight bits lose nothing to the operands' type."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atoma_jax import ops
from atoma_jax.ops.kernel_linear import has_kernel
from atoma_jax.quant.qtensor import LayerVariants, QTensor
from tests.native.weights import FORMATS, tiled


def ternary(N: int, K: int, layout: str) -> tuple[QTensor, np.ndarray]:
    """A weight of −1, 0 and 1 times one power of two, which bfloat16 holds, and its values."""
    codes = np.random.default_rng(0).integers(0, 3, (N, K)).astype(np.uint8)
    rows = layout == "rows"
    scales = np.full((N, 1) if rows else (1, N), 2.0**-6, np.float32)
    return QTensor(
        codes=jnp.asarray((codes.astype(np.int8) - 1).reshape(N, 1, K) if rows else ops.pack_planar(codes, 2, 64)),
        scales=jnp.asarray(scales),
        mins=None,
        scale_supers=None,
        min_supers=None,
        permutation=None,
        layout="rows" if rows else "planar",
        shape=(N, K),
        group=K,
        bits=8 if rows else 2,
        zero=0 if rows else 1,
        table=None,
        plane=0 if rows else 64,
    ), (codes.astype(np.float64) - 1) * 2.0**-6


@pytest.mark.parametrize("layout", ["rows", "planar"])
@pytest.mark.parametrize("operands", ["float32", "bfloat16"])
def test_activations_of_eight_bits_are_exact_in_any_operands(layout, operands):
    weight, values = ternary(32, 512, layout)
    x = np.random.default_rng(1).standard_normal((5, 512)).astype(np.float32)
    backend = ops.Backend(platform="cpu", operands=operands, weight_layout=layout)
    got = jax.jit(lambda x, weight: ops.linear(x, weight, backend, int8_activations=True))(x, weight)
    scale = np.float32(127) / np.abs(x).max(axis=1, keepdims=True)
    want = (np.rint(x * scale).astype(np.float64) @ values.T) / scale
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("layers", "kernel"), [(8, True), (40, False), (80, True)])
def test_arrays_that_a_kernel_cannot_address_are_left_to_xla(layers, kernel):
    """Bytes between 2 and 4 GiB: their offsets would wrap. Nothing is allocated."""
    weight, _ = ternary(1, 512, "planar")
    large = dataclasses.replace(
        weight,
        codes=jax.ShapeDtypeStruct((layers, 32768, 1024), jnp.uint16),
        scales=jax.ShapeDtypeStruct((layers, 1, 32768), jnp.float32),
        shape=(32768, 8192),
        group=8192,
    )
    backend = ops.Backend(platform="cuda", operands="bfloat16", weight_layout="planar", kernels="pallas")
    assert has_kernel(large, backend) == kernel


@pytest.mark.parametrize("kernels", ["xla", "interpret"])
def test_a_layer_of_a_stack_is_multiplied(kernels):
    """Packed, and as a bfloat16 matrix; each by its own kernel."""
    weight, values = ternary(32, 512, "planar")
    stack = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf), leaf]), weight)
    dense = jnp.stack([jnp.zeros(values.shape), jnp.asarray(values)]).astype(jnp.bfloat16)
    x = np.random.default_rng(1).integers(-8, 9, (3, 512)).astype(np.float32)
    backend = ops.Backend(platform="cpu", operands="bfloat16", weight_layout="planar", kernels=kernels)
    for one in (stack, dense):
        got = jax.jit(lambda x, one: ops.linear(x, one, backend, layer=jnp.int32(1)))(x, one)
        np.testing.assert_allclose(got, x @ values.T, rtol=1e-6)


@pytest.mark.parametrize(("precision", "rounds"), [("default", True), ("high", False), ("exact", False)])
def test_default_precision_alone_rounds_what_dense_weights_are_multiplied_by(precision, rounds):
    """To bfloat16, where there are instructions for it, so the program must say so everywhere."""
    backend = ops.Backend(
        platform="cpu", operands="float32", weight_layout="tiles", kernels="native", precision=precision
    )
    weight = jnp.zeros((2, 8, 16), jnp.bfloat16)
    product = jax.make_jaxpr(lambda x: ops.linear(x, weight, backend, layer=jnp.int32(1)))(jnp.zeros((3, 16)))
    (call,) = (eqn for eqn in product.eqns if eqn.params.get("target_name") == "atoma_dense")
    assert bool(dict(call.params["attributes"])["may_round"]) is rounds


@pytest.mark.parametrize(("F", "calls"), [(64, ["atoma_matmul"]), (48, ["atoma_matmul", "atoma_gated"])])
def test_a_gate_that_is_no_whole_tiles_is_a_call_of_its_own(F, calls):
    backend = ops.Backend(platform="cpu", operands="float32", weight_layout="tiles", kernels="native")
    weight = tiled(FORMATS["Q4_0"], 2 * F, 64).weight
    x = jnp.ones((3, 64))

    def product(x):
        normed = ops.Normed(x, jnp.ones((1, 64)), jnp.int32(0), 1e-6)
        return ops.linear(normed, weight, backend, layer=jnp.int32(1), gate="silu")

    traced = jax.make_jaxpr(product)(x)
    assert [eqn.params["target_name"] for eqn in traced.eqns if eqn.primitive.name == "ffi_call"] == calls
    assert traced.out_avals[0].shape == (3, F)


@pytest.mark.parametrize(
    ("precision", "how", "calls"),
    [
        ("default", {}, ["atoma_net"]),
        ("high", {}, ["atoma_net"]),
        ("exact", {}, ["atoma_matmul", "atoma_matmul"]),
        ("default", {"int8_activations": True}, ["atoma_matmul", "atoma_matmul"]),  # scales of whole tokens
        ("default", {"sub_norm": lambda h: h}, ["atoma_matmul", "atoma_matmul"]),
    ],
    ids=["default", "high", "exact", "tokens", "sub-norm"],
)
def test_a_net_is_one_call_where_gates_are_rounded_tile_by_tile(precision, how, calls):
    backend = ops.Backend(
        platform="cpu", operands="float32", weight_layout="tiles", kernels="native", precision=precision
    )
    up, down = tiled(FORMATS["Q4_0"], 128, 96).weight, tiled(FORMATS["Q4_0"], 96, 64).weight
    x = jnp.ones((3, 96))
    net = partial(
        ops.net_of_stream, up=up, down=down, activation="silu", backend=backend, tokens=3, layer=jnp.int32(1), **how
    )
    traced = jax.make_jaxpr(lambda x: net(x, residual=x))(x)
    assert [eqn.params["target_name"] for eqn in traced.eqns if eqn.primitive.name == "ffi_call"] == calls


def test_layers_whose_down_projections_differ_have_a_net_each():
    backend = ops.Backend(platform="cpu", operands="float32", weight_layout="tiles", kernels="native")
    shapes = (("Q4_0", 128, 96), ("Q4_0", 96, 64), ("Q5_0", 96, 64))
    up, *downs = (tiled(FORMATS[kind], N, K).weight for kind, N, K in shapes)
    variants = LayerVariants(stacks=tuple(downs), which=(0, 1, 1, 0), place=(0, 0, 1, 1))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 96)), jnp.float32)

    @jax.jit
    def net(layer):
        stack = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), up)
        return ops.net_of_stream(x, stack, variants, "silu", backend, tokens=3, layer=layer, residual=x)

    for layer, (which, place) in enumerate([(0, 0), (1, 0), (1, 1), (0, 1)]):
        h = ops.linear(x, up, backend, layer=jnp.int32(layer % 2), gate="silu")
        due = x + ops.linear(h, downs[which], backend, layer=jnp.int32(place))
        np.testing.assert_array_equal(net(jnp.int32(layer)), due)
