"""Paged attention with the write of K and V, as a call of the compiled kernels. Knows arrays, and no batch."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float32, Int32

_NO_BLOCKS = (np.zeros((), np.int32), *(np.zeros(0, np.int32),) * 4)


def attention(
    q: Float32[Array, "T N H"],
    k: Float32[Array, "T K H"],
    v: Float32[Array, "T K H"],
    cache: Sequence[Array],
    *,
    page: Int32[Array, " T"],
    slot: Int32[Array, " T"],
    page_table: Int32[Array, "B W"],
    decode_lengths: Int32[Array, " B"],
    blocks: Sequence[Array] | None,
    layer: Int32[Array, ""],
    window: Int32[Array, ""],
    scale: float,
    softcap: float | None,
) -> tuple[Float32[Array, "T N H"], list[Array]]:
    """Writes the step's K and V into the cache, in place, then attends to it. The library must be loaded.

    A query's result depends on its sequence alone: the same bits in any batch and with any number of threads.

    Args:
        q: queries, rotated.
        k: keys, rotated.
        v: values.
        cache: K and V of all layers, then their scales where the format has them, as `kv_pages.KVPages`.
        page: that each token goes to.
        slot: inside that page.
        page_table: pages of each sequence; behind its end anything.
        decode_lengths: context of each sequence that decodes, whose query is the token of its row; 0 for the others.
        blocks: the five arrays of `paged_attention.QueryBlocks`; None where no sequence prefills.
        layer: whose pages.
        window: how far back a query sees, itself included.
        scale: factor of the logits.
        softcap: logits become `softcap · tanh(logits / softcap)`.

    Returns:
        The result, zeros for tokens that no sequence claims, and the cache.
    """
    step = (q, k, v, page, slot, page_table, decode_lengths, *(_NO_BLOCKS if blocks is None else blocks))
    args = (*step, layer, window, *cache)
    first = len(args) - len(cache)
    call = jax.ffi.ffi_call(
        "atoma_attention",
        [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (q, *cache)],
        input_output_aliases={first + i: 1 + i for i in range(len(cache))},
    )
    out, *new = call(*args, scale=np.float32(scale), softcap=np.float32(softcap or 0.0))
    return out, new
