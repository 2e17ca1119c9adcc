"""The one place that chooses a kernel: by platform, by the weight's layout, by shape.

Today every platform runs the XLA routes of `pallas_kernels`. Models call these functions and know no kernel.
"""

from dataclasses import dataclass
from typing import Literal, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from atoma_jax.quant.qtensor import Layout, QTensor
from pallas_kernels import kv_pages
from pallas_kernels import paged_attention as attention_kernels
from pallas_kernels import quantized_matmul as matmul_kernels
from pallas_kernels.kv_pages import KVPages, empty_pages
from pallas_kernels.paged_attention import QueryBlocks
from pallas_kernels.quantized_matmul import pack_planar

# Types and packings of the kernels that others need come from here: nobody else imports kernels.
__all__ = [
    "AttentionBatch",
    "Backend",
    "KVPages",
    "QueryBlocks",
    "attend",
    "embed",
    "empty_pages",
    "linear",
    "pack_planar",
    "query_blocks",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Where and in which arithmetic a model runs. Part of every program's key."""

    platform: Literal["cpu", "cuda"]
    operands: Literal["float32", "bfloat16"]  # of products with quantized weights; sums are float32
    weight_layout: Layout  # of quantized weights


@no_type_check  # JAX also fills it with abstract values
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """Where the tokens of a step lie. T tokens, B sequences, page tables of W pages.

    Sequences that decode come first: token i belongs to sequence i, for as many as decode.
    """

    page: Int32[Array, " T"]  # that each token's K and V go to
    slot: Int32[Array, " T"]  # inside that page
    page_table: Int32[Array, "B W"]
    decode_lengths: Int32[Array, " B"]  # context of each sequence that decodes, this step included; 0 for the others
    blocks: QueryBlocks | None  # work of the sequences that prefill; None: the program only decodes


def linear(x: Float[Array, "T K"], weight: QTensor | Array, backend: Backend) -> Float32[Array, "T N"]:
    """x · Wᵀ for a weight `[N, K]`, summed in float32. Dense weights are multiplied in the type they have."""
    if not isinstance(weight, QTensor):
        return matmul_kernels.dot(x.astype(weight.dtype), weight)
    operands = jnp.dtype(backend.operands)
    if weight.layout == "rows":
        return matmul_kernels.matmul_rows(x, weight.codes, weight.scales, weight.mins, operands=operands)
    return matmul_kernels.matmul_planar(
        x,
        weight.codes,
        weight.scales,
        weight.mins,
        bits=weight.bits,
        plane=weight.plane,
        zero=weight.zero,
        operands=operands,
    )


def embed(ids: Int32[Array, " T"], table: QTensor | Array) -> Float32[Array, "T D"]:
    """Rows of a table `[V, D]`."""
    if not isinstance(table, QTensor):
        return table[ids].astype(jnp.float32)
    if table.layout == "rows":
        return matmul_kernels.dequantize(
            table.codes[ids], table.scales[ids], None if table.mins is None else table.mins[ids]
        )
    codes = matmul_kernels.unpack_planar(table.codes[ids], table.bits, table.plane)
    codes = codes.reshape(ids.shape[0], table.scales.shape[0], -1)  # [T, G, g]
    mins = None if table.mins is None else table.mins[:, ids].T
    return matmul_kernels.dequantize(codes, table.scales[:, ids].T, mins, zero=table.zero)


def attend(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    pages: KVPages,
    batch: AttentionBatch,
    *,
    layer: Int32[Array, ""],
    window: Int32[Array, ""],
    scale: float,
    softcap: float | None,
) -> tuple[Float32[Array, "T N H"], KVPages]:
    """Writes the step's K and V into their pages, then attends to them: both depend on the pages' layout.

    Args:
        q: queries of the step's tokens, rotated.
        k: keys, rotated.
        v: values.
        pages: the cache of all layers; returned with the new entries, in place where donated.
        batch: where the tokens lie.
        layer: index of the layer in the cache.
        window: how many positions back a query sees, itself included.
        scale: factor of the logits.
        softcap: limit of the logits' size, by tanh.
    """
    pages = kv_pages.write_kv(pages, k, v, layer=layer, page=batch.page, slot=batch.slot)
    B = batch.decode_lengths.shape[0]
    decoded = attention_kernels.decode_attention(
        q[:B],
        pages,
        layer=layer,
        page_table=batch.page_table,
        lengths=batch.decode_lengths,
        window=window,
        scale=scale,
        softcap=softcap,
    )
    if batch.blocks is None:
        return decoded, pages
    out = attention_kernels.ragged_attention(
        q,
        pages,
        batch.blocks,
        layer=layer,
        page_table=batch.page_table,
        window=window,
        scale=scale,
        softcap=softcap,
    )
    decodes = (batch.decode_lengths > 0)[:, None, None]
    out = out.at[:B].set(jnp.where(decodes, decoded, out[:B]))
    return out, pages


def query_blocks(
    start: Int32[Array, " B"], count: Int32[Array, " B"], position: Int32[Array, " B"], num_tokens: int
) -> QueryBlocks:
    """The attention work list of a step with prefill; built once, shared by all layers."""
    return attention_kernels.query_blocks(start, count, position, num_tokens)
