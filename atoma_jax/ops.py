"""The one place that chooses a kernel: by platform, by the weight's layout, by shape.

Weights in tiles are multiplied by the native kernels for CPUs, others by the XLA routes of `pallas_kernels`; attention
goes with the backend's kernels. Models call these functions and know no kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from atoma_jax.native import attention as native_attention
from atoma_jax.native import library as native_library
from atoma_jax.native import matmul as native_matmul
from atoma_jax.native.tiles import put_codes, put_factors
from atoma_jax.quant.qtensor import LayerVariants, Layout, QTensor
from pallas_kernels import grouped_matmul as grouped_kernels
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
    "Kernels",
    "Platform",
    "QueryBlocks",
    "attend",
    "embed",
    "empty_pages",
    "grouped_feed_forward",
    "has_native_kernels",
    "linear",
    "pack_planar",
    "put_codes",
    "put_factors",
    "query_blocks",
]

# Integer products go group by group: with smaller groups, rounding the activations and multiplying floats is quicker.
_INTEGER_GROUP = 128

Platform = Literal["cpu", "cuda"]
Kernels = Literal["xla", "pallas", "interpret", "native"]
Precision = Literal["default", "high", "exact"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Where and in which arithmetic a model runs. Part of every program's key."""

    platform: Platform
    operands: Literal["float32", "bfloat16"]  # of products with quantized weights; sums are float32
    weight_layout: Layout  # of quantized weights
    kernels: Kernels = "xla"  # interpret: the Pallas kernels without a GPU, step by step; for tests
    precision: Precision = "default"  # of activations in native products: int8, two int8 planes, float32


def has_native_kernels() -> bool:
    """Whether this process can run them; the log says once why not."""
    return native_library.library() is not None


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


def linear(
    x: Float[Array, "T K"],
    weight: QTensor | LayerVariants | Array,
    backend: Backend,
    *,
    layer: Int32[Array, ""] | None = None,
    int8_activations: bool = False,
) -> Float32[Array, "T N"]:
    """x · Wᵀ for a weight `[N, K]`, summed in float32. Dense weights are multiplied in the type they have.

    Args:
        x: activations.
        weight: of one layer, or variants of all layers.
        backend: where it runs.
        layer: whose, of variants and of weights in tiles; None where a weight has no layers.
        int8_activations: each token of `x` is rounded to int8 first, because the model was trained so.
    """
    if isinstance(weight, LayerVariants):
        assert layer is not None, "variants are of several layers"

        def product(stack: QTensor | Array, place: Int32[Array, ""]) -> Float32[Array, "T N"]:
            return _of_stack(x, stack, (place,), backend, int8_activations=int8_activations)

        return _in_variant(weight, layer, product)
    if isinstance(weight, QTensor) and weight.layout == "tiles":
        return _tiled_linear(x, weight, () if layer is None else (layer,), backend, int8_activations=int8_activations)
    if int8_activations:
        return _integer_linear(x, weight, backend)
    if isinstance(weight, QTensor):
        return _quantized_linear(x, weight, backend)
    return matmul_kernels.dot(x.astype(weight.dtype), weight)


def _of_stack(
    x: Float[Array, "T K"],
    stack: QTensor | Array,
    index: tuple[Int32[Array, ""], ...],
    backend: Backend,
    *,
    int8_activations: bool,
) -> Float32[Array, "T N"]:
    """`linear` with the matrix at an index of a stack's leading axes."""
    if isinstance(stack, QTensor) and stack.layout == "tiles":
        return _tiled_linear(x, stack, index, backend, int8_activations=int8_activations)
    return linear(x, _picked(stack, *index), backend, int8_activations=int8_activations)


def _tiled_linear(
    x: Float[Array, "T K"],
    weight: QTensor,
    index: tuple[Int32[Array, ""], ...],
    backend: Backend,
    *,
    int8_activations: bool,
) -> Float32[Array, "T N"]:
    """By the native kernels, which take whole stacks: a part of one would be copied first."""
    index = index[: len(weight.lead)]  # the head has no layers
    place = jnp.int32(0)
    for size, at in zip(weight.lead, index, strict=True):
        place = place * size + at
    if weight.permutation is not None:
        x = x[:, _picked(weight.permutation, *index)]
    activations: native_matmul.Activations = "tokens" if int8_activations else _ACTIVATIONS[backend.precision]
    return native_matmul.matmul(x.astype(jnp.float32), weight, place, activations)


_ACTIVATIONS: dict[Precision, native_matmul.Activations] = {"default": "groups", "high": "planes", "exact": "exact"}


def _integer_linear(x: Float[Array, "T K"], weight: QTensor | Array, backend: Backend) -> Float32[Array, "T N"]:
    """`linear` of tokens as int8. Their codes are exact in bfloat16 too, so that the factor of a token comes last."""
    exact = isinstance(weight, QTensor) and weight.layout == "rows" and weight.codes.dtype == jnp.int8
    if isinstance(weight, QTensor) and exact and weight.group >= _INTEGER_GROUP and weight.permutation is None:
        return matmul_kernels.matmul_int8(x, weight.codes, weight.scales, weight.mins)
    codes, factor = matmul_kernels.quantize_tokens(x)
    return linear(codes.astype(jnp.float32), weight, backend) * factor


def _in_variant(
    weight: LayerVariants, layer: Int32[Array, ""], use: Callable[[QTensor | Array, Array], Array]
) -> Array:
    """`use(stack, place)` of the stack that holds a layer; it is compiled once for each stack."""
    which, place = jnp.asarray(weight.which)[layer], jnp.asarray(weight.place)[layer]
    return lax.switch(which, [partial(use, stack) for stack in weight.stacks], place)


def _picked(weight: QTensor | Array, *index: Int32[Array, ""]) -> QTensor | Array:
    """The part of a weight at an index of its leading axes."""

    def pick(leaf: Array) -> Array:
        rest = leaf.shape[len(index) :]
        start = (*index, *(jnp.int32(0) for _ in rest))
        return lax.dynamic_slice(leaf, start, (*(1 for _ in index), *rest)).reshape(rest)

    return jax.tree.map(pick, weight)


def _quantized_linear(x: Float[Array, "T K"], weight: QTensor, backend: Backend) -> Float32[Array, "T N"]:
    if weight.permutation is not None:
        x = x[:, weight.permutation]
    operands = jnp.dtype(backend.operands)
    if weight.layout == "rows":
        return matmul_kernels.matmul_rows(x, weight.codes, weight.scales, weight.mins, operands=operands)
    return matmul_kernels.matmul_planar(
        x,
        weight.codes,
        matmul_kernels.flat_factors(weight.scales, weight.scale_supers),
        None if weight.mins is None else matmul_kernels.flat_factors(weight.mins, weight.min_supers),
        bits=weight.bits,
        plane=weight.plane,
        zero=weight.zero,
        table=weight.table,
        operands=operands,
    )


def grouped_feed_forward(
    x: Float[Array, "T D"],
    experts: Int32[Array, "T k"],
    weights: Float32[Array, "T k"],
    gate_up: QTensor | LayerVariants | Array,
    down: QTensor | LayerVariants | Array,
    activate: Callable[[Array], Array],
    backend: Backend,
    *,
    layer: Int32[Array, ""],
    int8_activations: bool,
) -> Float32[Array, "T D"]:
    """The weighted sum of each token's experts: down(activate(gate_up · x)). Only experts that are chosen are read.

    Args:
        x: tokens.
        experts: that each token goes to.
        weights: of each of them.
        gate_up: of all layers and experts, `[L, E, 2F, D]`.
        down: likewise, `[L, E, D, F]`.
        activate: `[rows, 2F]` to `[rows, F]`.
        backend: where it runs.
        layer: which layer's weights.
        int8_activations: as in `linear`.
    """
    E = jax.tree.leaves(gate_up)[0].shape[1]  # every layout has its leading axes first
    blocks = grouped_kernels.expert_blocks(experts, E)

    def grouped(rows: Float[Array, "padded K"], weight: QTensor | LayerVariants | Array) -> Float32[Array, "padded N"]:
        def product(stack: QTensor | Array, place: Int32[Array, ""]) -> Float32[Array, "padded N"]:
            N = stack.shape[0] if isinstance(stack, QTensor) else stack.shape[2]

            def of_expert(block: Float[Array, "M K"], expert: Int32[Array, ""]) -> Float32[Array, "M N"]:
                return _of_stack(block, stack, (place, expert), backend, int8_activations=int8_activations)

            return grouped_kernels.grouped_product(rows, blocks, of_expert, N)

        return _in_variant(weight, layer, product) if isinstance(weight, LayerVariants) else product(weight, layer)

    hidden = activate(grouped(grouped_kernels.sorted_rows(x, blocks, E), gate_up))
    return grouped_kernels.combine(grouped(hidden, down), blocks, weights)


def embed(ids: Int32[Array, " T"], table: QTensor | Array) -> Float32[Array, "T D"]:
    """Rows of a table `[V, D]`."""
    if not isinstance(table, QTensor):
        return table[ids].astype(jnp.float32)
    assert table.permutation is None, "no format permutes an embedding"
    if table.layout == "tiles":
        return native_matmul.rows(ids, table, jnp.int32(0))
    if table.layout == "rows":
        return matmul_kernels.dequantize(
            table.codes[ids], table.scales[ids], None if table.mins is None else table.mins[ids]
        )

    def factors(values: Array, supers: Array | None) -> Array:
        picked = None if supers is None else supers[:, ids]
        return matmul_kernels.flat_factors(values[:, ids], picked).T  # [T, G]

    codes = matmul_kernels.unpack_planar(table.codes[ids], table.bits, table.plane)
    codes = codes.reshape(ids.shape[0], table.scales.shape[0], -1)  # [T, G, g]
    mins = None if table.mins is None else factors(table.mins, table.min_supers)
    scales = factors(table.scales, table.scale_supers)
    return matmul_kernels.dequantize(codes, scales, mins, zero=table.zero, table=table.table)


def attend(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    pages: KVPages,
    batch: AttentionBatch,
    backend: Backend,
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
        backend: where it runs.
        layer: index of the layer in the cache.
        window: how many positions back a query sees, itself included.
        scale: factor of the logits.
        softcap: limit of the logits' size, by tanh.
    """
    if backend.kernels == "native":
        out, cache = native_attention.attention(
            *(q, k, v),
            [part for part in pages if part is not None],
            page=batch.page,
            slot=batch.slot,
            page_table=batch.page_table,
            decode_lengths=batch.decode_lengths,
            blocks=batch.blocks,
            layer=layer,
            window=window,
            scale=scale,
            softcap=softcap,
        )
        return out, KVPages(*cache)
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
