"""Writes a step's K and V into their pages as a Pallas kernel (Triton), in place. What it writes is `kv_pages.py`'s to
say: this is `write_kv` in one launch, quantization included, where XLA takes a scatter for each array of the cache.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from pallas_kernels.kv_pages import KVFormat, KVPages, encode, format_of

TOKENS = 16  # of a program, all of one kv head


def write_kv(
    pages: KVPages,
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    *,
    layer: Int32[Array, ""],
    page: Int32[Array, " T"],
    slot: Int32[Array, " T"],
    interpret: bool = False,
) -> KVPages:
    """`kv_pages.write_kv`; `pages` is donated. Which of several tokens stays at one place in page 0 is left open."""
    T, K, H = k.shape
    operands = (layer.reshape(1), page, slot, k, v)
    kept, tree = jax.tree.flatten(pages)
    written = pl.pallas_call(
        partial(_write_kernel, T=T, H=H, form=format_of(pages)),
        grid=(pl.cdiv(T, TOKENS), K),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in kept],
        input_output_aliases={len(operands) + i: i for i in range(len(kept))},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="write_kv",
    )(*operands, *kept)
    return jax.tree.unflatten(tree, written)


def _write_kernel(
    layer: Any, page: Any, slot: Any, k: Any, v: Any, *pages: Any, T: int, H: int, form: KVFormat
) -> None:
    """K and V of some tokens, for one kv head. `pages` are the arrays of the cache, once as given and once to write."""
    cache = KVPages(*pages[len(pages) // 2 :])
    head = pl.program_id(1)
    token = pl.program_id(0) * TOKENS + jnp.arange(TOKENS, dtype=jnp.int32)
    exists, dims = token < T, jnp.arange(pl.next_power_of_2(H), dtype=jnp.int32)
    inside = exists[:, None] & (dims < H)[None]
    to_page = plt.load(page.at[token], mask=exists, other=0)
    to_slot = plt.load(slot.at[token], mask=exists, other=0)

    def put(x: Any, to: Any, scales: Any) -> None:
        vectors = plt.load(x.at[token[:, None], head, dims[None]], mask=inside, other=0.0)
        stored, scale = encode(vectors, form, to_integers=_round)
        plt.store(to.at[layer[0], to_page[:, None], head, to_slot[:, None], dims[None]], stored, mask=inside)
        if scale is not None:
            plt.store(scales.at[layer[0], to_page, head, to_slot], scale, mask=exists)

    put(k, cache.k, cache.k_scale)
    put(v, cache.v, cache.v_scale)


def _round(x: Array) -> Array:
    """To the nearest integer, halves to even: Triton's lowering has no such operation."""
    below = jnp.floor(x)
    rest, is_odd = x - below, below - 2.0 * jnp.floor(below * 0.5) == 1.0
    return jnp.where((rest > 0.5) | ((rest == 0.5) & is_odd), below + 1.0, below)
