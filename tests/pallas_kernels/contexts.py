"""Paged contexts for tests of attention: made by numpy alone, poisoned where nothing belongs, and read in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import kv_pages
from pallas_kernels.kv_pages import KVPages
from tests.kv_cache import numbers, poison_of

NO_WINDOW = 1 << 30
LAYERS, LAYER = 2, 1
# Of the type that kernels multiply in: a weight is rounded to it, which moves it by at most this share.
ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11, "fp8_e4m3": 2.0**-11, "int8": 2.0**-8}
OPERANDS = {"float32": np.float32, "float16": np.float16, "fp8_e4m3": np.float16}  # bfloat16 for the others


@dataclass(frozen=True)
class Heads:
    """N query heads, K kv heads, H head dim, S page size."""

    N: int
    K: int
    H: int
    S: int


class Contexts:
    """Random contexts of some lengths in shuffled pages of one layer; every other slot holds NaN."""

    def __init__(self, heads: Heads, lengths: Sequence[int], kv_dtype: str, *, width: int, as_bits: bool = True):
        self.heads, self.kv_dtype = heads, kv_dtype
        K, H, S = heads.K, heads.H, heads.S
        rng = np.random.default_rng(sum(lengths))
        needed = [-(-length // S) for length in lengths]
        num_pages = len(lengths) * width + 1
        shuffled = iter(rng.permutation(np.arange(1, num_pages)))
        self.table = np.full((len(lengths), width), num_pages + 7, np.int32)  # behind a context anything may stand
        empty = kv_pages.empty_pages((LAYERS, num_pages, K, S, H), kv_dtype, as_bits=as_bits)
        self._poisoned = [None if a is None else np.full(a.shape, poison_of(np.asarray(a)), a.dtype) for a in empty]
        for row, count in enumerate(needed):
            self.table[row, :count] = [next(shuffled) for _ in range(count)]
            for cache, scales in (self._poisoned[0::2], self._poisoned[1::2]):
                values = rng.standard_normal((lengths[row], K, H)).astype(np.float32)
                self._put(cache, scales, row, values)

    def _put(self, cache: np.ndarray, scales: np.ndarray | None, row: int, values: np.ndarray) -> None:
        page, slot = self.place(row, np.arange(len(values)))
        scale = None
        if scales is not None:
            largest = 127 if self.kv_dtype == "int8" else 448
            scale = np.abs(values).max(-1) / np.float32(largest)
            values = values / scale[..., None]
            scales[LAYER, page, :, slot] = scale
        code = {"bfloat16": ml_dtypes.bfloat16, "fp8_e4m3": ml_dtypes.float8_e4m3fn}.get(self.kv_dtype, cache.dtype)
        codes = np.rint(values) if self.kv_dtype == "int8" else values
        cache[LAYER, page, :, slot] = codes.astype(code).view(cache.dtype)

    def place(self, row: int, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Page and slot of positions of a sequence."""
        return self.table[row, position // self.heads.S], (position % self.heads.S).astype(np.int32)

    def pages(self) -> KVPages:
        """The cache on the device, k and v with their scales."""
        k, v, k_scale, v_scale = (None if a is None else jnp.asarray(a) for a in self._poisoned)
        return KVPages(k, v, k_scale, v_scale)


def attention_of(
    contexts: Contexts,
    pages: KVPages,
    q: np.ndarray,
    row: int,
    positions: np.ndarray,
    *,
    window: int = NO_WINDOW,
    softcap: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Queries `[T, N, H]` of one sequence at some positions, in float64 over what `pages` hold; and how far from that
    a kernel may be that rounds the weights of V to its operands' type."""
    heads = contexts.heads
    group = heads.N // heads.K
    at = np.arange(positions.max() + 1)
    page, slot = contexts.place(row, at)
    k, v = (np.repeat(part[LAYER, page, :, slot], group, axis=1) for part in numbers(pages, contexts.kv_dtype))
    q = q.astype(OPERANDS.get(contexts.kv_dtype, ml_dtypes.bfloat16)).astype(np.float64)
    logits = np.einsum("tnh,cnh->tnc", q, k) * heads.H**-0.5
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    seen = (at <= positions[:, None]) & (at > positions[:, None] - window)
    logits = np.where(seen[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    v = np.where(seen.any(0)[:, None, None], v, 0.0)  # 0 · NaN is NaN
    rounding = ROUNDING[contexts.kv_dtype] * np.einsum("tnc,cnh->tnh", weights, np.abs(v))
    return np.einsum("tnc,cnh->tnh", weights, v), rounding + 2e-5
