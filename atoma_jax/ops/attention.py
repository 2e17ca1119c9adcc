"""Attention of a step over the paged cache, and what its kernels want to know of the step."""

from dataclasses import dataclass
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from atoma_jax.native import attention as native_attention
from atoma_jax.ops.backend import Backend
from atoma_jax.ops.pending import Attended
from pallas_kernels import attention_work, kv_pages, kv_write_pallas, paged_attention, paged_attention_pallas
from pallas_kernels.attention_work import DecodeParts, QueryBlocks
from pallas_kernels.decode_combine import combined
from pallas_kernels.kv_pages import KVPages
from pallas_kernels.tuning import AttentionTiles

# Programs that a step of few sequences which decode is spread over: four for each multiprocessor of a large GPU.
_PROGRAMS = 512
_INTERPRETED_PROGRAMS = 16  # these run one after another
_FIXED_PARTS = 8  # of the longest context, where how it is cut must not depend on others


@no_type_check  # JAX also fills it with abstract values
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """Where the tokens of a step lie. T tokens, B sequences, page tables of W pages.

    Sequences that decode come first: token i belongs to sequence i, for as many as decode.
    """

    page: Int32[Array, " T"]  # that each token's K and V go to: where its row's page table has its position
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
        block = paged_attention_pallas.tiles_of("decode", pages, num_heads, backend.device).span
        part, num_parts = _context_parts(pages, backend, decode_lengths.shape[0], -(-longest // block), fixed_parts)
        parts = attention_work.decode_parts(
            decode_lengths, block=block, num_parts=num_parts, part=part, cover_empty=chunks is None
        )
        if chunks is not None:
            tiles = _prefill_tiles(pages, num_heads, T, backend)
            size = max(1, tiles.rows // (num_heads // pages.k.shape[2]))
            blocks = attention_work.padded_query_blocks(*chunks, decode_lengths, T, size=size)
    return AttentionBatch(
        page=page, slot=slot, page_table=page_table, decode_lengths=decode_lengths, blocks=blocks, parts=parts
    )


def _context_parts(pages: KVPages, backend: Backend, B: int, blocks: int, fixed: bool) -> tuple[int | None, int]:
    """Blocks of a part of a context, None where the step decides, and how many parts B contexts, of so many blocks at
    most, have at most."""
    if not fixed:
        programs = _PROGRAMS if backend.kernels == "pallas" else _INTERPRETED_PROGRAMS
        return None, B + -(-programs // pages.k.shape[2])
    part = -(-blocks // _FIXED_PARTS)
    return part, B * -(-blocks // part)


def _prefill_tiles(pages: KVPages, num_heads: int, num_tokens: int, backend: Backend) -> AttentionTiles:
    """Tiles that were measured on this device with any size of pages and steps, if their kernel has these and is not to
    be interpreted; else default ones."""
    tiles = paged_attention_pallas.tiles_of("prefill", pages, num_heads, backend.device)
    if tiles.kernel == "triton":
        return tiles
    if backend.kernels == "pallas" and _mosaic().why_not(pages, num_heads, num_tokens, tiles) is None:
        return tiles
    return paged_attention_pallas.tiles_of("prefill", pages, num_heads, "")


def _mosaic() -> Any:
    """The kernels of Mosaic GPU. Their import takes a quarter of a second, and few devices take one of them."""
    from pallas_kernels import paged_attention_mosaic

    return paged_attention_mosaic


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
) -> tuple[Float32[Array, "T NH"] | Attended, KVPages]:
    """Writes the step's K and V into their pages, then attends to them: both depend on the pages' layout. Results are
    rows of all heads; of a step that only decodes, the product that comes next may put them together.

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
        return out.reshape(q.shape[0], -1), KVPages(*cache)
    what: dict[str, Any] = {"layer": layer, "window": window, "scale": scale, "softcap": softcap}
    if batch.parts is not None:
        return _attend_by_pallas(q, k, v, pages, batch, batch.parts, backend, what)
    pages = kv_pages.write_kv(pages, k, v, layer=layer, page=batch.page, slot=batch.slot)
    out = _attend_by_xla(q, pages, batch, what | {"page_table": batch.page_table})
    return out.reshape(q.shape[0], -1), pages


def _attend_by_pallas(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    pages: KVPages,
    batch: AttentionBatch,
    parts: DecodeParts,
    backend: Backend,
    what: dict[str, Any],
) -> tuple[Float32[Array, "T NH"] | Attended, KVPages]:
    interpret = backend.kernels == "interpret"
    # One array, so that XLA makes it in one launch: sums of the projection's parts, norms and rotation included.
    qkv = jnp.concatenate([q, k, v], axis=1)
    # Where each token is a row that decodes, attention writes its K and V itself: one launch less.
    writes = batch.blocks is None and q.shape[0] == batch.decode_lengths.shape[0]
    if not writes:
        place = {"layer": what["layer"], "page": batch.page, "slot": batch.slot}
        pages = kv_write_pallas.write_kv(pages, qkv, **place, interpret=interpret)
    what = what | {"page_table": batch.page_table, "interpret": interpret}
    tiles = paged_attention_pallas.tiles_of("decode", pages, q.shape[1], backend.device)
    decoded, pages = paged_attention_pallas.decode_attention(
        *(qkv, pages, parts, tiles), lengths=batch.decode_lengths, writes=writes, **what
    )
    if batch.blocks is None:
        return Attended(decoded), pages
    tiles = _prefill_tiles(pages, q.shape[1], q.shape[0], backend)
    attention = paged_attention_pallas if tiles.kernel == "triton" else _mosaic()
    out = combined(decoded, interpret=interpret)
    out = attention.ragged_attention(qkv, pages, batch.blocks, out, tiles, **what)
    return out.reshape(q.shape[0], -1), pages


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
