"""The kernel that writes K and V, interpreted, leaves the cache bit for bit as its twin does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import kv_pages, kv_write_pallas
from pallas_kernels.kv_pages import KVPages
from tests.kv_cache import KV_DTYPES, poison_of

T, K, H = 19, 2, 80  # tokens: a whole program's and some; H is no power of two
SHAPE = (2, 9, K, 8, H)


def by_the_kernel(pages: KVPages, k: jax.Array, v: jax.Array, **place: jax.Array) -> KVPages:
    """Behind three heads of queries, which are not to be written."""
    q = jnp.full((k.shape[0], 3, k.shape[2]), 1e9)
    return kv_write_pallas.write_kv(pages, jnp.concatenate([q, k, v], axis=1), **place, interpret=True)


def tokens() -> np.ndarray:
    """K and V of many magnitudes, with halves to round, what is not finite, and zeros."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, T, K, H)) * np.exp2(rng.integers(-20, 10, (2, T, K, 1)))
    x[:, 3, 1, 2], x[:, 4, 0, 79] = np.nan, np.inf
    x[:, 5], x[:, 6] = 0.0, 1e-37
    x[:, 7, :, :10] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 0.49999997, -0.49999997]
    x[:, 7, :, 10:] = 0.0
    return x.astype(np.float32)


@pytest.mark.parametrize(("T", "K", "H"), [(16, 1, 64), (1, 3, 96), (17, 2, 256)])
def test_it_writes_any_number_of_tokens_and_heads_of_any_size(T: int, K: int, H: int) -> None:
    pages = kv_pages.empty_pages((2, 4, K, 8, H), "int8", as_bits=True)
    k, v = np.random.default_rng(T).standard_normal((2, T, K, H)).astype(np.float32)
    at = np.arange(5, 5 + T, dtype=np.int32)  # over the borders of pages
    place = {"layer": np.int32(1), "page": 1 + at // 8, "slot": at % 8}
    want = jax.jit(kv_pages.write_kv)(pages, k, v, **place)
    got = jax.jit(by_the_kernel)(pages, k, v, **place)
    for left, right in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


@pytest.mark.parametrize(
    ("kv_dtype", "as_bits"), [*((name, True) for name in KV_DTYPES), ("bfloat16", False), ("fp8_e4m3", False)]
)
def test_it_writes_what_its_twin_writes_and_nothing_else(kv_dtype: str, as_bits: bool) -> None:
    empty = kv_pages.empty_pages(SHAPE, kv_dtype, as_bits=as_bits)
    poisoned = jax.tree.map(lambda a: np.full(a.shape, poison_of(np.asarray(a)), a.dtype), empty)
    page, slot = (1 + np.arange(T) // 5).astype(np.int32), (3 + np.arange(T) % 5).astype(np.int32)
    page[-1], slot[-1] = 0, 0  # padding
    k, v = tokens()

    def written(write) -> KVPages:
        pages = jax.tree.map(jnp.asarray, poisoned)
        return jax.jit(write)(pages, k, v, layer=np.int32(1), page=page, slot=slot)

    want, got = written(kv_pages.write_kv), written(by_the_kernel)
    for left, right in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        # Page 0 is scratch: tokens that are none may write there too.
        assert np.asarray(left)[:, 1:].tobytes() == np.asarray(right)[:, 1:].tobytes()
