"""Norms, rotated heads and gated activations: every variant against float64, at sizes that fill vectors or do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atoma_jax.model_spec import Activation
from atoma_jax.native import rowwise
from atoma_jax.native.library import Library

WIDTHS = (1, 3, 16, 31, 64, 80, 576, 1003)
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "relu_squared")

rms_norm = jax.jit(rowwise.rms_norm, static_argnums=2)
gated = jax.jit(rowwise.gated, static_argnums=1)


def rows_of_every_size(count: int, width: int) -> np.ndarray:
    """float32 rows that differ in size by powers of ten."""
    rng = np.random.default_rng(width)
    return (rng.standard_normal((count, width)) * 10.0 ** rng.integers(-4, 3, (count, 1))).astype(np.float32)


def normed(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x * scale / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps)


def activated(gate: np.ndarray, activation: Activation) -> np.ndarray:
    gate = gate.astype(np.float64)
    if activation == "silu":
        return gate / (1 + np.exp(-gate))
    if activation == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return np.maximum(gate, 0) ** 2


@pytest.mark.parametrize("width", WIDTHS)
def test_norms_are_those_of_float64(variant: str, width: int):
    x = rows_of_every_size(37, width)
    scale = np.random.default_rng(1).standard_normal(width).astype(np.float32)
    for eps in (1e-5, 0.5):
        expected = normed(x, scale, eps)
        got = np.asarray(rms_norm(jnp.asarray(x), jnp.asarray(scale), eps))
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize(
    ("N", "K", "H", "half"), [(9, 3, 64, 32), (4, 4, 80, 40), (6, 1, 96, 12), (2, 1, 10, 5), (3, 3, 8, 0)]
)
def test_heads_are_those_of_float64(variant: str, N: int, K: int, H: int, half: int, with_norms: bool):
    T, G = 21, N // K
    rng = np.random.default_rng(H)
    qkv = rng.standard_normal((T, K, G + 2, H)).astype(np.float32)
    angles = rng.uniform(-9, 9, (T, half))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    scales = rng.uniform(0.5, 2, (2, H)).astype(np.float32)
    norms = (jnp.asarray(scales[0]), jnp.asarray(scales[1])) if with_norms else None
    tables = jnp.asarray(cos), jnp.asarray(sin)
    call = jax.jit(rowwise.rotated_heads, static_argnames=("num_heads", "num_kv_heads", "eps"))
    got = call(jnp.asarray(qkv.reshape(T, -1)), *tables, num_heads=N, num_kv_heads=K, norms=norms, eps=1e-5)

    def turned(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        x = normed(x.reshape(-1, H), scale, 1e-5).reshape(x.shape) if with_norms else x.astype(np.float64)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
        return np.concatenate([first * c - second * s, second * c + first * s, rest], axis=-1)

    q = turned(qkv[:, :, :G].reshape(T, N, H), scales[0])
    k = turned(qkv[:, :, G], scales[1])
    for name, array, expected in zip("qk", got, (q, k), strict=False):
        np.testing.assert_allclose(np.asarray(array), expected, rtol=1e-6, atol=2e-6, err_msg=name)
    np.testing.assert_array_equal(np.asarray(got[2]), qkv[:, :, G + 1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_gated_activations_are_those_of_float64(variant: str, width: int, activation: Activation):
    x = rows_of_every_size(37, 2 * width).clip(-80, 80)
    expected = activated(x[:, :width], activation) * x[:, width:]
    error = np.abs(np.asarray(gated(jnp.asarray(x), activation)) - expected)
    allowed = 2e-6 * np.abs(expected) + 1e-36
    if activation == "gelu_tanh":  # 1 + tanh of a large negative number is a difference of ones in float32
        allowed += 2e-7 * np.abs(x[:, :width] * x[:, width:])
    assert (error <= allowed).all(), (error / allowed).max()


def test_far_gates_are_closed_or_open(variant: str):
    gate_up = jnp.asarray([[-1e30, -200.0, 200.0, 1e30, 1.0, 1.0, 1.0, 1.0]], jnp.float32)
    for activation in ("silu", "gelu_tanh"):
        got = np.asarray(gated(gate_up, activation))[0]
        assert np.abs(got[1]) < 1e-30
        np.testing.assert_allclose(got[2:], [200.0, 1e30], rtol=1e-6)


def test_rows_are_by_themselves(variant: str, kernels: Library):
    """The same bits alone and among others, on one thread and on more; NaN stays in its row, and no row is left out."""
    x = rows_of_every_size(300, 576)
    x[7, 100] = np.nan
    x[298:] = 0
    scale = jnp.linspace(0.5, 2, 576)
    norm, gate = np.asarray(rms_norm(jnp.asarray(x), scale, 1e-5)), np.asarray(gated(jnp.asarray(x), "silu"))
    assert np.isnan(norm[7]).all()
    assert np.isnan(gate[7]).sum() == 1
    for rows in (norm, gate):
        assert np.isfinite(np.delete(rows, 7, axis=0)).all()
        assert not rows[298:].any()
    for row in (0, 150, 297):
        np.testing.assert_array_equal(np.asarray(rms_norm(jnp.asarray(x[row : row + 1]), scale, 1e-5))[0], norm[row])
        np.testing.assert_array_equal(np.asarray(gated(jnp.asarray(x[row : row + 1]), "silu"))[0], gate[row])
    with kernels.forced(threads=1):
        np.testing.assert_array_equal(np.asarray(rms_norm(jnp.asarray(x), scale, 1e-5)), norm)
        np.testing.assert_array_equal(np.asarray(gated(jnp.asarray(x), "silu")), gate)


def test_arrays_that_do_not_fit_are_refused(kernels: Library):
    x, scale = jnp.ones((2, 6), jnp.float32), jnp.ones(5, jnp.float32)
    call = jax.ffi.ffi_call("atoma_rms_norm", jax.ShapeDtypeStruct((2, 6), jnp.float32))
    with pytest.raises(Exception, match=r"rows of activations: the scale must be \[D\]"):
        jax.block_until_ready(call(x, scale, eps=np.float32(1e-5)))
    shapes = [jax.ShapeDtypeStruct((2, heads, 2), jnp.float32) for heads in (1, 1, 1)]
    call, table = jax.ffi.ffi_call("atoma_rotate_heads", shapes), jnp.ones((2, 1), jnp.float32)
    none = jnp.zeros(0, jnp.float32)
    for args, problem in (
        ((x[:, :5], table, table, none, none), r"the projection must be \[tokens, K · \(N / K \+ 2\) · H\]"),
        ((x, table, table[:1], none, none), r"tables must be \[tokens, half\]"),
        ((x, jnp.ones((2, 2), jnp.float32), jnp.ones((2, 2), jnp.float32), none, none), "more rotates than a head has"),
        ((x, table, table, scale, none), r"the scale must be \[H\], or empty"),
    ):
        with pytest.raises(Exception, match=f"rows of activations: {problem}"):
            jax.block_until_ready(call(*args, eps=np.float32(1e-5)))
    call = jax.ffi.ffi_call("atoma_gated", jax.ShapeDtypeStruct((2, 4), jnp.float32))
    with pytest.raises(Exception, match=r"rows of activations: the result must be \[rows, F\] of 2F"):
        jax.block_until_ready(call(x, activation=np.int64(0)))
    call = jax.ffi.ffi_call("atoma_gated", jax.ShapeDtypeStruct((2, 3), jnp.float32))
    with pytest.raises(Exception, match="rows of activations: unknown activation"):
        jax.block_until_ready(call(x, activation=np.int64(3)))
