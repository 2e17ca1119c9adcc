"""Packing loses nothing, dequantization is exact, and products are those of float64."""

from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels import quantized_matmul as kernel

F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


def weight(N: int, K: int, g: int, *, mins: bool, low: int = -8, high: int = 8):
    """Codes [N, K/g, g], scales and mins [N, K/g], and the exact weight [N, K]."""
    rng = np.random.default_rng(N + K)
    codes = rng.integers(low, high, (N, K // g, g)).astype(np.int8)
    scales = rng.uniform(0.01, 0.1, (N, K // g)).astype(np.float16).astype(np.float32)
    offsets = rng.uniform(-0.3, 0.3, (N, K // g)).astype(np.float16).astype(np.float32) if mins else None
    exact = codes * scales.astype(np.float64)[..., None]
    if offsets is not None:
        exact = exact - offsets[..., None]
    return codes, scales, offsets, exact.reshape(N, K)


unpack = jax.jit(kernel.unpack_planar, static_argnums=(1, 2))


@hypothesis.given(data=st.data())
def test_unpacking_undoes_packing(data):
    bits = data.draw(st.sampled_from([1, 2, 4, 8]))
    plane = data.draw(st.sampled_from([16, 32, 64]))
    N, K = 3, 2 * plane * 16 // bits  # each shape compiles anew
    seed = data.draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(0, 2**bits, (N, K)).astype(np.uint8)
    words = kernel.pack_planar(codes, bits, plane)
    assert words.shape == (N, K * bits // 16)
    np.testing.assert_array_equal(unpack(jnp.asarray(words), bits, plane), codes)


@pytest.mark.optimized  # what flushes subnormals to zero is a matter of how it is compiled
def test_every_e4m3_is_read_from_its_bits():
    bits = np.arange(256, dtype=np.uint8)
    want = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    found = np.asarray(jax.jit(kernel.from_e4m3)(bits))
    np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(want))


def test_planes_are_contiguous_along_k():
    """What the GPU kernels count on: field i of word j of block b is element b·KB + i·P + j."""
    bits, plane = 4, 16
    codes = np.random.default_rng(0).integers(0, 16, (2, 128)).astype(np.uint8)
    words = kernel.pack_planar(codes, bits, plane)
    for b, i, j in np.ndindex(2, 4, plane):
        field = (words[:, b * plane + j] >> (bits * i)) & 15
        np.testing.assert_array_equal(field, codes[:, b * 4 * plane + i * plane + j])


@pytest.mark.parametrize("mins", [False, True])
def test_dequantization_is_exact(mins):
    codes, scales, offsets, exact = weight(5, 96, 32, mins=mins)
    got = kernel.dequantize(jnp.asarray(codes), jnp.asarray(scales), None if offsets is None else jnp.asarray(offsets))
    np.testing.assert_array_equal(got, exact.astype(np.float32))
    shifted = (codes.astype(np.int16) + 8).astype(np.uint16)
    got = kernel.dequantize(
        jnp.asarray(shifted), jnp.asarray(scales), None if offsets is None else jnp.asarray(offsets), zero=8
    )
    np.testing.assert_array_equal(got, exact.astype(np.float32))


# Tiles: none, even ones, rows that no tile count divides, a prime, and one row more than a tile holds.
@pytest.mark.parametrize(("N", "K"), [(7, 64), (96, 64), (128, 64), (130, 64), (131, 64), (65, 64), (1, 4096)])
@pytest.mark.parametrize("mins", [False, True])
def test_products_with_rows_in_tiles_of_any_size(monkeypatch, N, K, mins):
    monkeypatch.setattr(kernel, "TILE_ELEMENTS", 64 * 64)
    codes, scales, offsets, exact = weight(N, K, 32, mins=mins)
    x = np.random.default_rng(3).standard_normal((5, K)).astype(np.float32)
    got = jax.jit(partial(kernel.matmul_rows, operands=F32))(x, codes, scales, offsets)
    np.testing.assert_allclose(got, x @ exact.T, rtol=1e-5, atol=1e-4)


def test_a_large_product_is_tiled_as_the_small_ones():
    N, K = 1009, 2080  # a prime, and over a million elements twice
    assert N * K > 2 * kernel.TILE_ELEMENTS * 0.9
    codes, scales, offsets, exact = weight(N, K, 32, mins=True)
    x = np.random.default_rng(4).standard_normal((3, K)).astype(np.float32)
    got = jax.jit(partial(kernel.matmul_rows, operands=F32))(x, codes, scales, offsets)
    np.testing.assert_allclose(got, x @ exact.T, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize(("bits", "zero"), [(4, 0), (4, 8), (8, 128), (8, 32)])
@pytest.mark.parametrize("mins", [False, True])
def test_planar_products(bits, zero, mins):
    N, K, g = 48, 256, 32
    codes, scales, offsets, exact = weight(N, K, g, mins=mins, low=-min(zero, 8), high=16 - min(zero, 8))
    unsigned = (codes.astype(np.int16) + zero).astype(np.uint8).reshape(N, K)
    words = kernel.pack_planar(unsigned, bits, 32)
    x = np.random.default_rng(5).standard_normal((6, K)).astype(np.float32)
    run = jax.jit(partial(kernel.matmul_planar, bits=bits, plane=32, zero=zero, table=None, operands=F32))
    got = run(x, words, scales.T, None if offsets is None else offsets.T)
    np.testing.assert_allclose(got, x @ exact.T, rtol=1e-5, atol=1e-4)


def test_bfloat16_operands_are_rounded_and_sums_are_not():
    codes, scales, offsets, exact = weight(32, 512, 32, mins=True)
    x = np.random.default_rng(6).standard_normal((16, 512)).astype(np.float32)
    got = jax.jit(partial(kernel.matmul_rows, operands=BF16))(x, codes, scales, offsets)
    rounded = exact.astype(np.float32).astype(BF16).astype(np.float64)
    want = x.astype(BF16).astype(np.float64) @ rounded.T
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_numbers_of_a_table_and_integer_scales():
    """W4 codebook: codes index a table; scales are int8 times a float of their supergroup."""
    N, K, g, supergroup = 16, 512, 32, 256
    rng = np.random.default_rng(7)
    table = tuple(int(value) for value in rng.integers(-127, 128, 16))
    codes = rng.integers(0, 16, (N, K)).astype(np.uint8)
    scales = rng.integers(-32, 32, (K // g, N)).astype(np.int8)
    supers = rng.uniform(1e-3, 1e-2, (K // supergroup, N)).astype(np.float32)
    flat = np.asarray(kernel.flat_factors(jnp.asarray(scales), jnp.asarray(supers)))
    np.testing.assert_array_equal(flat, scales.astype(np.float32) * np.repeat(supers, supergroup // g, axis=0))
    exact = np.asarray(table, np.float64)[codes] * np.repeat(flat.T.astype(np.float64), g, axis=1)
    x = rng.standard_normal((6, K)).astype(np.float32)
    run = jax.jit(partial(kernel.matmul_planar, bits=4, plane=32, zero=0, table=table, operands=F32))
    got = run(x, kernel.pack_planar(codes, 4, 32), flat, None)
    np.testing.assert_allclose(got, x @ exact.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("mins", [False, True])
def test_integer_products_are_exact_sums(groups, mins):
    N, K = 24, 512
    codes, scales, offsets, exact = weight(N, K, K // groups, mins=mins, low=-128, high=128)
    x = np.random.default_rng(8).standard_normal((5, K)).astype(np.float32)
    tokens, factor = (np.asarray(part) for part in kernel.quantize_tokens(jnp.asarray(x)))
    largest = np.abs(x).max(axis=1, keepdims=True)
    np.testing.assert_array_equal(tokens, np.clip(np.rint(x * (np.float32(127) / largest)), -128, 127))
    got = jax.jit(kernel.matmul_int8)(x, codes, scales, offsets)
    want = (tokens.astype(np.float64) @ exact.T) * factor
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * np.abs(want).max())


def test_a_token_that_holds_nan_or_infinity_shows_it_in_its_own_row_alone():
    codes, scales, offsets, _ = weight(8, 256, 256, mins=False)
    x = np.random.default_rng(9).standard_normal((4, 256)).astype(np.float32)
    x[1, 3], x[2, 7] = np.nan, np.inf
    got = np.asarray(kernel.matmul_int8(jnp.asarray(x), jnp.asarray(codes), jnp.asarray(scales), offsets))
    assert np.isnan(got[[1, 2]]).all()
    assert np.isfinite(got[[0, 3]]).all()


def test_a_token_of_zeros_gives_zeros():
    codes, scales, offsets, _ = weight(8, 256, 256, mins=False)
    got = kernel.matmul_int8(jnp.zeros((1, 256)), jnp.asarray(codes), jnp.asarray(scales), offsets)
    np.testing.assert_array_equal(got, np.zeros((1, 8)))
