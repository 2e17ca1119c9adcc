"""Writes K and V of a step that prefills into their pages as a Pallas kernel (Triton), in place. What it writes is
`kv_pages.py`'s to say: this is `write_kv` in one launch, quantization included, where XLA takes a scatter for each
array of the cache. A step that only decodes writes where it attends, by `put_head`.

K and V come in one array behind the step's queries, as the attention kernels take them: XLA then makes all three in one
launch, the one that adds up the parts of the projection and rotates.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.kv_pages import KVFormat, KVPages, encode, format_of

TOKENS = 16  # of a program, all of one kv head


def write_kv(
    pages: KVPages,
    qkv: Float[Array, "T heads H"],
    *,
    layer: Int32[Array, ""],
    page: Int32[Array, " T"],
    slot: Int32[Array, " T"],
    interpret: bool = False,
) -> KVPages:
    """`kv_pages.write_kv`; `pages` is donated. Which of several tokens stays at one place in page 0 is left open.

    Args:
        pages: as there, like `layer`, `page` and `slot`.
        qkv: the heads of K, then those of V, behind any others.
        layer: likewise.
        page: likewise.
        slot: likewise.
        interpret: run the kernel's steps as plain JAX, on any device.
    """
    T, heads, H = qkv.shape
    K = pages.k.shape[2]
    operands = (layer.reshape(1), page, slot, qkv)
    kept, tree = jax.tree.flatten(pages)
    written = pl.pallas_call(
        partial(_write_kernel, T=T, H=H, first=heads - 2 * K, form=format_of(pages)),
        grid=(pl.cdiv(T, TOKENS), K),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in kept],
        input_output_aliases={len(operands) + i: i for i in range(len(kept))},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="write_kv",
    )(*operands, *kept)
    return jax.tree.unflatten(tree, written)


def _write_kernel(
    layer: Any, page: Any, slot: Any, qkv: Any, *pages: Any, T: int, H: int, first: int, form: KVFormat
) -> None:
    """K and V of some tokens, for one kv head; `first` is K's first. `pages` are the arrays of the cache, once as given
    and once to write."""
    cache = KVPages(*pages[len(pages) // 2 :])
    token = pl.program_id(0) * TOKENS + jnp.arange(TOKENS, dtype=jnp.int32)
    exists = token < T
    to_page = plt.load(page.at[token], mask=exists, other=0)
    to_slot = plt.load(slot.at[token], mask=exists, other=0)
    put_head(cache, qkv, pl.program_id(1), token, exists, (layer[0], to_page, to_slot), H=H, first=first, form=form)


def put_head(
    cache: KVPages,
    qkv: Any,
    head: Any,
    token: Int32[Array, " n"],
    exists: Bool[Array, " n"],
    at: tuple[Any, Int32[Array, " n"], Int32[Array, " n"]],
    *,
    H: int,
    first: int,
    form: KVFormat,
) -> None:
    """Inside a kernel: writes K and V of those tokens that exist, for one kv head, at a layer, pages and slots."""
    layer, page, slot = at
    dims = jnp.arange(pl.next_power_of_2(H), dtype=jnp.int32)
    inside = exists[:, None] & (dims < H)[None]

    def put(place: Any, to: Any, scales: Any) -> None:
        vectors = plt.load(qkv.at[token[:, None], place, dims[None]], mask=inside, other=0.0)
        stored, scale = encode(vectors, form, to_integers=_round)
        plt.store(to.at[layer, page[:, None], head, slot[:, None], dims[None]], stored, mask=inside)
        if scale is not None:
            plt.store(scales.at[layer, page, head, slot], scale, mask=exists)

    put(first + head, cache.k, cache.k_scale)
    put(first + cache.k.shape[2] + head, cache.v, cache.v_scale)


def _round(x: Array) -> Array:
    """To the nearest integer, halves to even: Triton's lowering has no such operation."""
    below = jnp.floor(x)
    rest, is_odd = x - below, below - 2.0 * jnp.floor(below * 0.5) == 1.0
    return jnp.where((rest > 0.5) | ((rest == 0.5) & is_odd), below + 1.0, below)
