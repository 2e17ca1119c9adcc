"""The one place that chooses a kernel: by platform, by the weight's layout, by shape.

Models call these functions and know no kernel. Where `Backend.kernels` asks for native kernels, they do attention and
multiply weights in tiles; where it asks for Pallas, its kernels do attention and multiply weights in the planar layout
and stacks of bfloat16 matrices. The rest is XLA's everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from atoma_jax.native import attention as native_attention
from atoma_jax.native import library as native_library
from atoma_jax.native import matmul as native_matmul
from atoma_jax.native.tiles import put_codes, put_factors
from atoma_jax.parts import gathered, inputs_of, own_experts, quantized_parts, stacked, without_last
from atoma_jax.quant.qtensor import LayerVariants, Layout, QTensor
from pallas_kernels import (
    attention_work,
    kv_pages,
    kv_write_pallas,
    paged_attention,
    paged_attention_pallas,
)
from pallas_kernels import grouped_matmul as grouped_kernels
from pallas_kernels import quantized_matmul as matmul_kernels
from pallas_kernels.attention_work import DecodeParts, QueryBlocks
from pallas_kernels.dense_matmul import dense_matmul
from pallas_kernels.kv_pages import KVPages
from pallas_kernels.planar_matmul import PlanarFormat, PlanarStack, planar_grouped_matmul, planar_matmul
from pallas_kernels.quantized_matmul import pack_planar
from pallas_kernels.ternary_matmul import is_ternary, ternary_matmul, ternary_matmul_xla
from pallas_kernels.tuning import matmul_tiles
from sharding.collectives import size_of, sum_over
from sharding.mesh import MeshShape

# Types and packings of the kernels that others need come from here: nobody else imports kernels.
__all__ = [
    "AttentionBatch",
    "Backend",
    "Chunks",
    "KVPages",
    "Kernels",
    "Platform",
    "attend",
    "attention_batch",
    "empty_pages",
    "grouped_feed_forward",
    "has_native_kernels",
    "layer_of",
    "linear",
    "linear_of_parts",
    "pack_planar",
    "put_codes",
    "put_factors",
]

# Integer products go group by group: with smaller groups, rounding the activations and multiplying floats is quicker.
_INTEGER_GROUP = 128
# Programs that a step of few sequences which decode is spread over: four for each multiprocessor of a large GPU.
_PROGRAMS = 512
_INTERPRETED_PROGRAMS = 16  # these run one after another
_FIXED_PARTS = 8  # of the longest context, where how it is cut must not depend on others

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
    device: str = ""  # its kind, as JAX calls it, for sizes that were measured there; empty: not known
    mesh: MeshShape | None = None  # that a step's arrays are cut over; None: one device

    @property
    def uses_pallas(self) -> bool:
        """Whether Pallas kernels run, compiled or interpreted."""
        return self.kernels in ("pallas", "interpret")

    @property
    def gathers(self) -> bool:
        """Whether weights are spread over devices that gather them before use."""
        return size_of(self.mesh, "fsdp") > 1


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
    parts: DecodeParts | None  # of the contexts of sequences that decode; None: kernels that take each whole


class Chunks(NamedTuple):
    """What each of B sequences prefills: its tokens in the flat batch. Rows lie in order, without gaps."""

    start: Int32[Array, " B"]  # first token
    num_tokens: Int32[Array, " B"]  # 0 for rows that decode and for padding
    position: Int32[Array, " B"]  # of the first token, in its sequence


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
        weight: of one layer, or of all layers: a stack, or variants.
        backend: where it runs.
        layer: whose of all layers'; without effect for the weight of one.
        int8_activations: each token of `x` is rounded to int8 first, because the model was trained so.
    """
    if isinstance(weight, LayerVariants):
        assert layer is not None, "variants are of several layers"

        def product(stack: QTensor | Array, place: Int32[Array, ""]) -> Float32[Array, "T N"]:
            return linear(x, stack, backend, layer=place, int8_activations=int8_activations)

        return _in_variant(weight, layer, product)
    if isinstance(weight, QTensor) and weight.layout == "tiles":
        index = () if layer is None or weight.lead == () else (layer,)
        return _tiled_linear(x, weight, index, backend, int8_activations=int8_activations)
    if backend.gathers and layer is not None and _lead(weight) != ():
        weight = layer_of(weight, layer, backend)
    if isinstance(weight, QTensor) and _has_kernel(weight, backend):
        return _kernel_linear(x, weight, backend, layer, int8_activations=int8_activations)
    if isinstance(weight, Array) and backend.uses_pallas and weight.ndim == 3 and weight.dtype == jnp.bfloat16:
        return _dense_linear(x, weight, backend, layer, int8_activations=int8_activations)
    if _lead(weight) != ():
        assert layer is not None, "the weight is of several layers"
        weight = _picked(weight, layer)
    if int8_activations:
        return _integer_linear(x, weight, backend)
    if isinstance(weight, QTensor):
        return _quantized_linear(x, weight, backend)
    return matmul_kernels.dot(x.astype(weight.dtype), weight)


def linear_of_parts(
    x: Float[Array, "T K"],
    weight: QTensor | LayerVariants | Array,
    backend: Backend,
    *,
    layer: Int32[Array, ""],
    int8_activations: bool = False,
) -> Float32[Array, "T N"]:
    """`linear` where inputs may be cut over devices, as heads and feed-forward nets are: the sum over the parts."""
    mesh = backend.mesh
    if size_of(mesh, "tensor") == 1:
        return linear(x, weight, backend, layer=layer, int8_activations=int8_activations)
    factor: Float32[Array, "T 1"] | None = None
    if int8_activations:
        x, factor = quantized_parts(x, mesh)

    def product(stack: QTensor | Array, place: Int32[Array, ""]) -> Float32[Array, "T N"]:
        return linear(inputs_of(x, stack, mesh), stack, backend, layer=place)

    y = _in_variant(weight, layer, product) if isinstance(weight, LayerVariants) else product(weight, layer)
    return sum_over(y if factor is None else y * factor, mesh, "tensor")


def layer_of(weight: QTensor | Array, layer: Int32[Array, ""], backend: Backend) -> QTensor | Array:
    """One layer of a stack, gathered from the devices that it is spread over."""
    return gathered(_picked(weight, layer), backend.mesh)


def _lead(weight: QTensor | Array) -> tuple[int, ...]:
    return weight.lead if isinstance(weight, QTensor) else weight.shape[:-2]


def _tiled_linear(
    x: Float[Array, "T K"],
    weight: QTensor,
    index: tuple[Int32[Array, ""], ...],
    backend: Backend,
    *,
    int8_activations: bool,
) -> Float32[Array, "T N"]:
    """By the native kernels, which take whole stacks: a part of one would be copied first."""
    place = jnp.int32(0)
    for size, at in zip(weight.lead, index, strict=True):
        place = place * size + at
    if weight.permutation is not None:
        x = x[:, _picked(weight.permutation, *index)]
    activations: native_matmul.Activations = "tokens" if int8_activations else _ACTIVATIONS[backend.precision]
    return native_matmul.matmul(x.astype(jnp.float32), weight, place, activations)


_ACTIVATIONS: dict[Precision, native_matmul.Activations] = {"default": "groups", "high": "planes", "exact": "exact"}


def _dense_linear(
    x: Float[Array, "T K"],
    stack: Array,
    backend: Backend,
    layer: Int32[Array, ""] | None,
    *,
    int8_activations: bool,
) -> Float32[Array, "T N"]:
    """`linear` of one of a stack of bfloat16 matrices, read in place."""
    assert layer is not None, "the weight is of several layers"
    factor: Float32[Array, "T 1"] | None = None
    if int8_activations:
        codes, factor = matmul_kernels.quantize_tokens(x)
        x = codes.astype(jnp.bfloat16)
    N, K = stack.shape[1:]
    tiles = matmul_tiles(backend.device, "dense_matmul", M=x.shape[0], N=N, K=K, bits=16, group=1)
    y = dense_matmul(x, stack, layer, tiles, interpret=backend.kernels == "interpret")
    return y if factor is None else y * factor


def _has_kernel(weight: QTensor, backend: Backend) -> bool:
    """Whether Pallas multiplies a weight."""
    if not backend.uses_pallas or weight.layout != "planar" or not _format(weight).is_aligned:
        return False
    # Triton counts in 32 bits up to 4 GiB: in an array of bytes, what lies behind 2 GiB would wrap around. The words
    # of ternary weights may be read as bytes.
    in_bytes = [leaf.size for leaf in (weight.scales, weight.mins) if leaf is not None and leaf.dtype == jnp.int8]
    in_bytes += [2 * weight.codes.size] if weight.bits == 2 else []
    return not any(2**31 <= size <= 2**32 for size in in_bytes)


def _format(weight: QTensor) -> PlanarFormat:
    return PlanarFormat(weight.bits, weight.plane, weight.group, weight.zero, weight.table)


def _is_ternary(weight: QTensor) -> bool:
    """Whether its products with int8 activations are sums of integers alone."""
    return weight.layout == "planar" and weight.mins is None and is_ternary(_format(weight), weight.shape[1])


def _stack(weight: QTensor) -> PlanarStack:
    """A weight with its leading axes as one."""
    parts = (weight.codes, weight.scales, weight.mins, weight.scale_supers, weight.min_supers)
    return PlanarStack(*(None if part is None else part.reshape(-1, *part.shape[-2:]) for part in parts))


def _kernel_linear(
    x: Float[Array, "T K"],
    weight: QTensor,
    backend: Backend,
    layer: Int32[Array, ""] | None,
    *,
    int8_activations: bool,
) -> Float32[Array, "T N"]:
    """`linear` of a weight, or of one of a stack, that Pallas reads in place."""
    kind, stack, (N, K) = _format(weight), _stack(weight), weight.shape
    place = jnp.int32(0) if layer is None or weight.lead == () else layer
    if weight.permutation is not None:
        x = x[:, weight.permutation.reshape(-1, K)[place]]
    shape = {"M": x.shape[0], "N": N, "K": K, "bits": kind.bits, "group": kind.group}
    interpret = backend.kernels == "interpret"
    if int8_activations and _is_ternary(weight):
        tiles = matmul_tiles(backend.device, "ternary_matmul", **shape)
        return ternary_matmul(x, stack.words, stack.scales, place, kind, tiles, interpret=interpret)
    tiles = matmul_tiles(backend.device, "planar_matmul", **shape)
    if not int8_activations:
        return planar_matmul(x, stack, place, kind, tiles, interpret=interpret)
    codes, factor = matmul_kernels.quantize_tokens(x)  # exact in bfloat16
    return planar_matmul(codes.astype(jnp.bfloat16), stack, place, kind, tiles, interpret=interpret) * factor


def _integer_linear(x: Float[Array, "T K"], weight: QTensor | Array, backend: Backend) -> Float32[Array, "T N"]:
    """`linear` of tokens as int8. Their codes are exact in bfloat16 too, so that the factor of a token comes last."""
    if isinstance(weight, QTensor) and weight.permutation is None and _is_ternary(weight):
        return ternary_matmul_xla(x, weight.codes, weight.scales, _format(weight))
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
    mesh = backend.mesh
    if size_of(mesh, "expert") > 1:
        experts, weights = own_experts(experts, weights, E, mesh)
        kinds = E + 1  # the last stands for the experts of other devices
        blocks = without_last(grouped_kernels.expert_blocks(experts, kinds), E)
    else:
        kinds = E
        blocks = grouped_kernels.expert_blocks(experts, kinds)
    in_parts = size_of(mesh, "tensor") > 1

    def grouped(
        x: Float[Array, "padded K"],
        weight: QTensor | LayerVariants | Array,
        *,
        cut_inputs: bool,
        int8_activations: bool,
    ) -> Float32[Array, "padded N"]:
        def product(stack: QTensor | Array, place: Int32[Array, ""]) -> Float32[Array, "padded N"]:
            rows = inputs_of(x, stack, mesh) if cut_inputs else x
            if backend.gathers:
                stack, place = stacked(layer_of(stack, place, backend)), jnp.int32(0)
            if isinstance(stack, QTensor) and _has_kernel(stack, backend) and stack.permutation is None:
                return _kernel_grouped(rows, blocks, stack, place, backend, int8_activations=int8_activations)
            N = stack.shape[0] if isinstance(stack, QTensor) else stack.shape[2]

            def of_expert(block: Float[Array, "M K"], expert: Int32[Array, ""]) -> Float32[Array, "M N"]:
                if isinstance(stack, QTensor) and stack.layout == "tiles":
                    index = (place, expert)
                    return _tiled_linear(block, stack, index, backend, int8_activations=int8_activations)
                return linear(block, _picked(stack, place, expert), backend, int8_activations=int8_activations)

            return grouped_kernels.grouped_product(rows, blocks, of_expert, N)

        return _in_variant(weight, layer, product) if isinstance(weight, LayerVariants) else product(weight, layer)

    rows = grouped_kernels.sorted_rows(x, blocks, kinds)
    hidden = activate(grouped(rows, gate_up, cut_inputs=False, int8_activations=int8_activations))
    factor: Float32[Array, "padded 1"] | None = None
    if in_parts and int8_activations:
        (hidden, factor), int8_activations = quantized_parts(hidden, mesh), False
    y = grouped(hidden, down, cut_inputs=in_parts, int8_activations=int8_activations)
    y = y if factor is None else y * factor
    return sum_over(grouped_kernels.combine(y, blocks, weights), mesh, "tensor", "expert")


def _kernel_grouped(
    rows: Float[Array, "padded K"],
    blocks: grouped_kernels.ExpertBlocks,
    weight: QTensor,
    layer: Int32[Array, ""],
    backend: Backend,
    *,
    int8_activations: bool,
) -> Float32[Array, "padded N"]:
    """Products of `sorted_rows` with the weights `[L, E, N, K]` of their experts in one layer, by Pallas."""
    kind, (N, K), E = _format(weight), weight.shape, weight.lead[1]
    M = rows.shape[0] - blocks.pair.shape[0]
    operation = "planar_grouped_matmul"
    tiles = matmul_tiles(backend.device, operation, M=M, N=N, K=K, bits=kind.bits, group=kind.group)
    factor: Float32[Array, "padded 1"] | None = None
    if int8_activations:
        codes, factor = matmul_kernels.quantize_tokens(rows)
        rows = codes.astype(jnp.bfloat16)
    y = planar_grouped_matmul(
        rows,
        _stack(weight),
        blocks.used,
        layer * E + blocks.expert,
        blocks.start,
        blocks.stop,
        kind,
        tiles,
        interpret=backend.kernels == "interpret",
    )
    return y if factor is None else y * factor


def empty_pages(shape: tuple[int, int, int, int, int], kv_dtype: str, backend: Backend) -> KVPages:
    """A KV cache of zeros: `shape` is (L, P, K, S, H), `kv_dtype` a name of `kv_pages.FORMATS`."""
    return kv_pages.empty_pages(shape, kv_dtype, as_bits=backend.platform == "cpu")


def attention_batch(
    pages: KVPages,
    num_heads: int,
    backend: Backend,
    *,
    page: Int32[Array, " T"],
    slot: Int32[Array, " T"],
    page_table: Int32[Array, "B W"],
    decode_lengths: Int32[Array, " B"],
    chunks: Chunks | None,
    fixed_parts: bool,
) -> AttentionBatch:
    """Where a step's tokens lie, and the work lists of its attention: built once, shared by all layers.

    Args:
        pages: the cache; its shape counts.
        num_heads: query heads of a layer.
        backend: where it runs.
        page: as in `AttentionBatch`, like the next three.
        slot: likewise.
        page_table: likewise.
        decode_lengths: likewise.
        chunks: what is prefilled; None: the program only decodes.
        fixed_parts: how a context is cut must not depend on the other contexts of the step.
    """
    T = page.shape[0]
    blocks = parts = None
    if not backend.uses_pallas:
        if chunks is not None:
            blocks = attention_work.query_blocks(*chunks, T, size=paged_attention.QUERY_BLOCK)
    else:
        longest = page_table.shape[1] * pages.k.shape[3]
        part, num_parts = _context_parts(pages, backend, decode_lengths.shape[0], longest, fixed=fixed_parts)
        block = paged_attention_pallas.context_block(pages)
        parts = attention_work.decode_parts(
            decode_lengths, block=block, num_parts=num_parts, part=part, cover_empty=chunks is None
        )
        if chunks is not None:
            size = paged_attention_pallas.prefill_block(pages, num_heads)
            blocks = attention_work.padded_query_blocks(*chunks, decode_lengths, T, size=size)
    return AttentionBatch(
        page=page, slot=slot, page_table=page_table, decode_lengths=decode_lengths, blocks=blocks, parts=parts
    )


def _context_parts(pages: KVPages, backend: Backend, B: int, longest: int, *, fixed: bool) -> tuple[int | None, int]:
    """Blocks of a part of a context, None where the step decides, and how many parts B contexts have at most."""
    if not fixed:
        programs = _PROGRAMS if backend.kernels == "pallas" else _INTERPRETED_PROGRAMS
        return None, B + -(-programs // pages.k.shape[2])
    blocks = -(-longest // paged_attention_pallas.context_block(pages))
    part = -(-blocks // _FIXED_PARTS)
    return part, B * -(-blocks // part)


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
    place: dict[str, Any] = {"layer": layer, "page": batch.page, "slot": batch.slot}
    what: dict[str, Any] = {"layer": layer, "page_table": batch.page_table, "window": window}
    what |= {"scale": scale, "softcap": softcap}
    if batch.parts is None:
        pages = kv_pages.write_kv(pages, k, v, **place)
        return _attend_by_xla(q, pages, batch, what), pages
    interpret = backend.kernels == "interpret"
    pages = kv_write_pallas.write_kv(pages, k, v, **place, interpret=interpret)
    out = paged_attention_pallas.decode_attention(
        q, pages, batch.parts, lengths=batch.decode_lengths, **what, interpret=interpret
    )
    if batch.blocks is not None:
        out = paged_attention_pallas.ragged_attention(q, pages, batch.blocks, out, **what, interpret=interpret)
    return out, pages


def _attend_by_xla(
    q: Float[Array, "T N H"], pages: KVPages, batch: AttentionBatch, what: dict[str, Any]
) -> Float32[Array, "T N H"]:
    B = batch.decode_lengths.shape[0]
    decoded = paged_attention.decode_attention(q[:B], pages, lengths=batch.decode_lengths, **what)
    if batch.blocks is None:
        return decoded
    out = paged_attention.ragged_attention(q, pages, batch.blocks, **what)
    decodes = (batch.decode_lengths > 0)[:, None, None]
    return out.at[:B].set(jnp.where(decodes, decoded, out[:B]))
