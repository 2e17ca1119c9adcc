"""The paged KV cache: what it keeps of K and V, how a step's tokens get in, and how a chunk of a context is read.

K and V of all layers are `[L, P, K, S, H]` each: layers, pages, kv heads, slots of a page, head dim. Page 0 is scratch:
what is padding writes there.

Of int8 and fp8_e4m3 the cache keeps codes, and for each vector of one token and kv head a scale: the vector's largest
magnitude over the largest code, value = code · scale. Codes are rounded to the nearest, halves to even. A vector that
holds NaN or an infinity gets the scale NaN: int8 knows neither, and whoever attends to it shall see that it is lost.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

SMALLEST = 1e-30  # a vector's largest magnitude counts as at least this, so that no scale is zero or subnormal


class KVFormat(NamedTuple):
    """How values are kept."""

    stored: Any  # dtype of the cache's arrays
    codes: Any  # dtype that their bits stand for
    largest: float | None  # code of a vector's largest magnitude; None: codes are values, and there are no scales


FORMATS: Mapping[str, KVFormat] = MappingProxyType(
    {
        "float32": KVFormat(jnp.float32, jnp.float32, None),
        "bfloat16": KVFormat(jnp.bfloat16, jnp.bfloat16, None),
        "float16": KVFormat(jnp.float16, jnp.float16, None),
        "fp8_e4m3": KVFormat(jnp.float8_e4m3fn, jnp.float8_e4m3fn, 448.0),
        "int8": KVFormat(jnp.int8, jnp.int8, 127.0),
    }
)
# What a CPU keeps instead: XLA:CPU computes with neither bfloat16 nor fp8, and widens whatever array of them it slices
# or scatters into. That would copy the whole cache in each layer. A GPU keeps the types themselves: Triton moves them
# to where its matrix units read them without a stop in registers.
_BITS = MappingProxyType({"bfloat16": jnp.uint16, "fp8_e4m3": jnp.uint8})
_FORMAT_OF = MappingProxyType(
    {jnp.dtype(form.stored): form for form in FORMATS.values()}
    | {jnp.dtype(bits): FORMATS[name]._replace(stored=bits) for name, bits in _BITS.items()}
)


class KVPages(NamedTuple):
    """The cache of all layers, as `FORMATS` says: the type of its arrays tells the format."""

    k: Shaped[Array, "L P K S H"]
    v: Shaped[Array, "L P K S H"]
    k_scale: Float32[Array, "L P K S"] | None = None
    v_scale: Float32[Array, "L P K S"] | None = None


class KVChunk(NamedTuple):
    """C tokens of one sequence's context. Where there are scales, a value is its entry times its token's scale."""

    k: Float32[Array, "K C H"]
    v: Float32[Array, "K C H"]
    k_scale: Float32[Array, "K C"] | None
    v_scale: Float32[Array, "K C"] | None


def format_of(pages: KVPages) -> KVFormat:
    """How a cache keeps values."""
    return _FORMAT_OF[pages.k.dtype]


def empty_pages(shape: tuple[int, int, int, int, int], kv_dtype: str, *, as_bits: bool) -> KVPages:
    """A cache of zeros.

    Args:
        shape: (L, P, K, S, H).
        kv_dtype: a name of `FORMATS`.
        as_bits: types that XLA:CPU does not compute with are kept as integers of their bits.
    """
    form = FORMATS[kv_dtype]
    stored = _BITS.get(kv_dtype, form.stored) if as_bits else form.stored

    def scales() -> Array | None:
        return None if form.largest is None else jnp.zeros(shape[:-1], jnp.float32)

    return KVPages(jnp.zeros(shape, stored), jnp.zeros(shape, stored), scales(), scales())


def write_kv(
    pages: KVPages,
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    *,
    layer: Int32[Array, ""],
    page: Int32[Array, " T"],
    slot: Int32[Array, " T"],
) -> KVPages:
    """Puts each token's K and V at its page and slot. Several tokens may share a place in page 0 alone."""

    def put(cache: Array, scales: Array | None, x: Array) -> tuple[Array, Array | None]:
        stored, scale = encode(x, _FORMAT_OF[cache.dtype])
        cache = cache.at[layer, page, :, slot].set(stored)
        return cache, None if scales is None else scales.at[layer, page, :, slot].set(scale)

    new_k, k_scale = put(pages.k, pages.k_scale, k)
    new_v, v_scale = put(pages.v, pages.v_scale, v)
    return KVPages(new_k, new_v, k_scale, v_scale)


def read_chunk(pages: KVPages, *, layer: Array, ids: Int32[Array, " n"], seen: Bool[Array, " C"]) -> KVChunk:
    """The context that lies in the pages `ids`. Unseen slots of V, and their scales, are zero, as 0 · NaN is NaN."""

    def read(cache: Array) -> Array:
        # A slice a page: XLA:CPU copies each at once, where a gather would compute the place of every element.
        shape, rest = (1, 1, *cache.shape[2:]), (0,) * (cache.ndim - 2)
        got = [lax.dynamic_slice(cache, (layer, ids[i], *rest), shape)[0, 0] for i in range(ids.shape[0])]
        return jnp.concatenate(got, axis=1)  # [K, C, …]

    def scales(cache: Array | None) -> Array | None:
        return None if cache is None else read(cache)

    form = _FORMAT_OF[pages.k.dtype]
    v_scale = scales(pages.v_scale)
    return KVChunk(
        decode(read(pages.k), form).astype(jnp.float32),
        jnp.where(seen[None, :, None], decode(read(pages.v), form).astype(jnp.float32), 0.0),
        scales(pages.k_scale),
        None if v_scale is None else jnp.where(seen, v_scale, 0.0),
    )


def encode(
    x: Float[Array, "*n H"], form: KVFormat, *, to_integers: Callable[[Array], Array] = jnp.round
) -> tuple[Shaped[Array, "*n H"], Float32[Array, "*n"] | None]:
    """What is stored of vectors, and their scales. `to_integers` rounds to the nearest, halves to even."""
    if form.largest is None:
        return _bits(x.astype(form.codes), form.stored), None
    x = x.astype(jnp.float32)
    magnitude = jnp.max(jnp.abs(x), -1)
    # Asked of each, as XLA:CPU's maximum may pass over a NaN; by a maximum, as Triton reduces by few functions.
    finite = jnp.max(jnp.where(jnp.isfinite(x), 0.0, 1.0), -1) == 0.0
    scale = jnp.where(finite, jnp.maximum(magnitude, SMALLEST) / form.largest, jnp.nan)
    codes = jnp.where(finite[..., None], x / scale[..., None], 0.0)
    if form.codes == jnp.int8:  # a conversion to integers would drop the fraction
        codes = jnp.clip(to_integers(codes), -form.largest, form.largest)
    return _bits(codes.astype(form.codes), form.stored), scale


def decode(stored: Shaped[Array, "*n"], form: KVFormat) -> Shaped[Array, "*n"]:
    """Codes of what is stored, in their own type."""
    return _bits(stored, form.codes)


def _bits(x: Shaped[Array, "*n"], dtype: Any) -> Shaped[Array, "*n"]:
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)
