"""The cache keeps what its format can tell of each token's K and V, and touches nothing that is not the token's own."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import kv_pages
from pallas_kernels.kv_pages import KVPages
from tests.kv_cache import KV_DTYPES, SCALED, numbers, poisoned_pages

LAYERS, PAGES, K, S, H = 2, 6, 2, 8, 64
LAYER = 1
T = 12  # tokens of a step, two of them padding
LARGEST = {"int8": np.float32(127), "fp8_e4m3": np.float32(448)}

write = jax.jit(kv_pages.write_kv)


def places() -> tuple[np.ndarray, np.ndarray]:
    """Pages and slots of T tokens, over a page's border; the last two are padding."""
    page = np.asarray([3] * 6 + [5] * 4 + [0, 0], np.int32)
    return page, np.asarray([2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 0, 0], np.int32)


def written(k: np.ndarray, kv_dtype: str, v: np.ndarray | None = None) -> KVPages:
    """A poisoned cache into which T tokens went."""
    page, slot = places()
    pages = poisoned_pages((LAYERS, PAGES, K, S, H), kv_dtype)
    return write(pages, k, k if v is None else v, layer=np.int32(LAYER), page=page, slot=slot)


def at_places(array: np.ndarray) -> np.ndarray:
    """What lies where the tokens that are no padding went: [T − 2, K, …]."""
    page, slot = places()
    return np.asarray(array)[LAYER, page[:-2], :, slot[:-2]]


def tokens(spread: float = 1.0, seed: int = 0) -> np.ndarray:
    """Vectors of many magnitudes."""
    rng = np.random.default_rng(seed)
    sizes = np.exp2(rng.integers(-20, 20, (T, K, 1)) * spread)
    return (rng.standard_normal((T, K, H)) * sizes).astype(np.float32)


def allowed_error(x: np.ndarray, kv_dtype: str) -> np.ndarray:
    """How far each number of a vector may be from what is kept of it: half a step of its format."""
    x = np.abs(x.astype(np.float64))
    largest = x.max(-1, keepdims=True)
    if kv_dtype == "int8":
        return np.broadcast_to(largest / 254, x.shape) * (1 + 1e-6)
    if kv_dtype == "fp8_e4m3":  # 3 bits behind the leading one; numbers below 2^-6 of 448 have fixed steps of 2^-9
        return np.maximum(x * 2.0**-4, largest / 448 * 2.0**-10) * (1 + 1e-6)
    return x * {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}[kv_dtype] + 2.0**-25


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_every_number_is_within_half_a_step(kv_dtype: str) -> None:
    x = tokens(spread=0.5 if kv_dtype == "float16" else 1.0)
    for kept in numbers(written(x, kv_dtype), kv_dtype):
        assert (np.abs(at_places(kept) - x[:-2]) <= allowed_error(x[:-2], kv_dtype)).all()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_k_and_v_go_to_their_own_arrays(kv_dtype: str) -> None:
    k, v = tokens(0.2, seed=1), tokens(0.2, seed=2)
    for kept, x in zip(numbers(written(k, kv_dtype, v), kv_dtype), (k, v), strict=True):
        assert (np.abs(at_places(kept) - x[:-2]) <= allowed_error(x[:-2], kv_dtype)).all()


@pytest.mark.parametrize("kv_dtype", SCALED)
def test_codes_are_the_nearest_under_a_scale_of_the_largest_magnitude(kv_dtype: str) -> None:
    """Bit-exact, but for the scale's last bit: XLA may multiply where numpy divides."""
    x = tokens()
    pages = written(x, kv_dtype)
    scale = at_places(pages.k_scale)
    np.testing.assert_allclose(scale, np.abs(x[:-2]).max(-1) / LARGEST[kv_dtype], rtol=3e-7)
    exact = x[:-2] / scale[..., None]
    if kv_dtype == "int8":
        np.testing.assert_array_equal(at_places(pages.k), np.rint(exact))
    else:
        np.testing.assert_array_equal(at_places(pages.k), exact.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def test_halves_are_rounded_to_even() -> None:
    x = np.zeros((T, K, H), np.float32)
    x[..., :8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]
    pages = written(x * 2.0**-5, "int8")
    np.testing.assert_array_equal(at_places(pages.k_scale), np.float32(2.0**-5))
    assert at_places(pages.k)[0, 0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-37, 1e-33])
def test_nothing_is_divided_by_zero(kv_dtype: str, size: float) -> None:
    pages = written(np.full((T, K, H), size, np.float32), kv_dtype)
    for kept in numbers(pages, kv_dtype):
        assert (np.abs(at_places(kept) - size) <= 1e-32).all()
    if kv_dtype in SCALED:
        scale = at_places(pages.k_scale)
        assert (scale >= np.finfo(np.float32).tiny).all(), "a subnormal one would be flushed to zero"


@pytest.mark.parametrize("kv_dtype", SCALED)
def test_the_largest_numbers_are_kept(kv_dtype: str) -> None:
    """Also where the scale was rounded down, so that the largest number is a little above its code."""
    x = tokens(seed=3) * 2.0**-20
    x[..., 7] = np.random.default_rng(4).uniform(1e38, 3.4e38, (T, K)).astype(np.float32)
    (kept, _), (largest, _) = numbers(written(x, kv_dtype), kv_dtype), numbers(written(-x, kv_dtype), kv_dtype)
    np.testing.assert_allclose(at_places(kept)[..., 7], x[:-2, :, 7], rtol=1e-6)
    np.testing.assert_allclose(at_places(largest)[..., 7], -x[:-2, :, 7], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_what_is_not_finite_stays_so_and_in_its_vector(kv_dtype: str, bad: float) -> None:
    x = tokens(0.2)
    clean, _ = numbers(written(x, kv_dtype), kv_dtype)
    x[3, 1, 17] = bad
    sick, _ = numbers(written(x, kv_dtype), kv_dtype)
    sick, clean = at_places(sick), at_places(clean)
    if kv_dtype in SCALED:
        assert np.isnan(sick[3, 1]).all(), "the vector has no scale that means anything"
    else:
        np.testing.assert_array_equal(sick[3, 1, 17], bad)
    sick[3, 1] = clean[3, 1]
    np.testing.assert_array_equal(sick, clean)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_writing_leaves_every_foreign_slot_bit_identical(kv_dtype: str) -> None:
    before = poisoned_pages((LAYERS, PAGES, K, S, H), kv_dtype)
    after = written(tokens(0.2), kv_dtype)
    own = np.zeros((LAYERS, PAGES, S), np.bool_)
    page, slot = places()
    own[LAYER, page, slot] = True
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        old, new = (np.moveaxis(np.asarray(array), 3, 2)[~own] for array in (old, new))  # slots before heads
        assert old.tobytes() == new.tobytes()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_new_cache_is_as_large_as_its_format_says_and_holds_zeros(kv_dtype: str) -> None:
    pages = kv_pages.empty_pages((LAYERS, PAGES, K, S, H), kv_dtype, as_bits=True)
    vector = {"float32": 4 * H, "bfloat16": 2 * H, "float16": 2 * H}.get(kv_dtype, H + 4)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pages)) == 2 * LAYERS * PAGES * K * S * vector
    for kept in numbers(pages, kv_dtype):
        np.testing.assert_array_equal(kept, 0.0)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_layers_loop_writes_and_reads_in_place(kv_dtype: str) -> None:
    """No program may copy the cache: of a large one, the loop over layers takes next to no memory."""
    shape = (4, 4000, K, 16, H)

    def step(pages: KVPages, x: jax.Array, ids: jax.Array) -> tuple[KVPages, jax.Array]:
        def layer(carry: tuple[KVPages, jax.Array], index: jax.Array) -> tuple[tuple[KVPages, jax.Array], None]:
            pages, x = carry
            pages = kv_pages.write_kv(pages, x, x, layer=index, page=ids, slot=ids % 16)
            chunk = kv_pages.read_chunk(pages, layer=index, ids=ids, seen=jnp.arange(16 * 8) < 100)
            sums = [part.sum() for part in chunk if part is not None]
            return (pages, x + jnp.stack(sums).sum()), None

        (pages, x), _ = jax.lax.scan(layer, (pages, x), jnp.arange(shape[0], dtype=jnp.int32))
        return pages, x

    pages = jax.eval_shape(partial(kv_pages.empty_pages, shape, kv_dtype, as_bits=True))
    x, ids = jax.ShapeDtypeStruct((8, K, H), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
    memory = jax.jit(step, donate_argnums=0).lower(pages, x, ids).compile().memory_analysis()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pages))
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 100
