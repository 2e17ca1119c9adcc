"""KV caches for tests: full of NaN where nothing was written, and read back as numbers by means of their own."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.kv_pages import KVPages, empty_pages

KV_DTYPES = ("float32", "bfloat16", "float16", "fp8_e4m3", "int8")
SCALED = ("fp8_e4m3", "int8")


def poison_of(array: np.ndarray) -> int | float:
    """What an array of a cache holds where it is NaN. int8 knows none: there, a large number beside the scale's NaN."""
    return {"uint16": 0x7FC0, "uint8": 0x7F, "int8": 77}.get(array.dtype.name, np.nan)


def poisoned_pages(shape: tuple[int, int, int, int, int], kv_dtype: str) -> KVPages:
    """A cache of nothing but NaN."""
    return jax.tree.map(
        lambda array: jnp.full(array.shape, poison_of(array), array.dtype), empty_pages(shape, kv_dtype, as_bits=True)
    )


def numbers(pages: KVPages, kv_dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """K and V in float64: [L, P, K, S, H]."""
    codes = {"bfloat16": ml_dtypes.bfloat16, "fp8_e4m3": ml_dtypes.float8_e4m3fn}

    def decoded(array: jax.Array, scale: jax.Array | None) -> np.ndarray:
        values = np.asarray(array)
        values = values.view(codes.get(kv_dtype, values.dtype)).astype(np.float64)
        return values if scale is None else values * np.asarray(scale, np.float64)[..., None]

    return decoded(pages.k, pages.k_scale), decoded(pages.v, pages.v_scale)
