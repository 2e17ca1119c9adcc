"""Attention over a paged KV cache as Pallas kernels (Triton). What they compute is `paged_attention.py`'s to say.

A sequence that decodes has one query: the query heads of a kv head are the rows of a small tile, and the parts of its
context go to different programs, whose partial sums a second kernel combines. A block of a prefill's queries fills a
large tile, rows being (token, query head of the group), and walks its context alone. The cache of all layers is passed
whole, so that no layer's pages are copied. Queries come in one array in front of the step's K and V: in a step that
only decodes, who attends to the last part of a context writes the row's K and V first; else `kv_write_pallas.py` has.

Products take their operands in the type of the cache, bfloat16 for int8 and float16 for fp8, and sum in float32.
Weights are powers of two, as those are what the hardware has. Each is one multiplication with addition and one power,
in assembly: the compiler makes twice as much of it, as it does not join operations and treats subnormal numbers apart.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention_work import DecodeParts, QueryBlocks
from pallas_kernels.decode_combine import DecodedParts
from pallas_kernels.kv_pages import KVFormat, KVPages, decode, format_of
from pallas_kernels.kv_write_pallas import put_head
from pallas_kernels.paged_attention import NEVER
from pallas_kernels.tuning import AttentionTiles, attention_tiles

_LOG2E = math.log2(math.e)
_SMALLEST_UNIT = 1e-20  # of scales in float16: vectors of V that are smaller still count as zeros


class _Shape(NamedTuple):
    """Static sizes of one call."""

    G: int  # query heads of a kv head
    S: int
    H: int
    width: int  # of tiles: H up to the next power of two
    rows: int  # of a tile of queries
    span: int  # tokens of context read at once
    scale: float
    softcap: float | None
    form: KVFormat
    precision: Any  # of products
    assembly: bool  # compiled for a GPU

    @property
    def unit(self) -> float:
        """Of logits as they are compared, in ln 2."""
        return _LOG2E * (self.scale if self.softcap is None else 1.0)


class _Cache(NamedTuple):
    """References to what all programs read."""

    layer: Any  # i32 [1]
    window: Any  # i32 [1]
    table: Any  # i32 [B, W]
    k: Any  # [L, P, K, S, H]
    v: Any
    k_scale: Any  # f32 [L, P, K, S], or None
    v_scale: Any


class _Softmax(NamedTuple):
    """Running softmax of M queries: weighted sum of V, largest logit, sum of weights."""

    acc: Array  # f32 [M, width]
    largest: Array  # f32 [M], in `unit`s
    total: Array  # f32 [M]


class _Place(NamedTuple):
    """Which context a program reads: scalars."""

    layer: Array
    row: Array  # of the page table
    head: Array  # kv head
    start: Array  # first position that any of its queries sees
    stop: Array  # behind the last


class _Tokens(NamedTuple):
    """Tokens of a context that are read at once."""

    at: Array  # positions
    seen: Array  # whether any query sees each
    page: Array  # of each, or of all
    slot: Array


def tiles_of(kernel: Literal["decode", "prefill"], pages: KVPages, num_heads: int, device: str) -> AttentionTiles:
    """How a kernel is cut for this cache and so many query heads; `device` as in `matmul_tiles`."""
    form, (K, _, H) = format_of(pages), pages.k.shape[2:]
    return attention_tiles(
        device,
        f"paged_attention_{kernel}",
        group=num_heads // K,
        head_dim=H,
        kv_dtype=jnp.dtype(form.codes).name,
        operand_bytes=jnp.dtype(_operands(form)).itemsize,
    )


def decode_attention(
    qkv: Float[Array, "T heads H"],
    pages: KVPages,
    parts: DecodeParts,
    tiles: AttentionTiles,
    *,
    layer: Int32[Array, ""],
    page_table: Int32[Array, "B W"],
    lengths: Int32[Array, " B"],
    window: Int32[Array, ""],
    scale: float,
    softcap: float | None,
    writes: bool,
    interpret: bool = False,
) -> tuple[DecodedParts, KVPages]:
    """Attention of one query a sequence, to be `combined`: token i is the query of row i, for the rows that `parts`
    covers.

    Arguments as in `paged_attention.decode_attention`, but that the queries are the first heads of `qkv`; `parts`
    counts contexts in blocks of `tiles.span`. `writes`: K and V of each row's token go into `pages` first, which are
    donated then: whoever attends to the last part of a context puts its last token there. Else they are there already.
    """
    N, (T, heads, H) = _query_heads(qkv, pages), qkv.shape
    K, W = pages.k.shape[2], parts.items.shape[0]
    shape = _shape(N, pages, tiles, scale, softcap, interpret)
    numbers = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    outs = [numbers((T, N, H)), numbers((W, N, H)), numbers((W, N)), numbers((W, N))]
    operands = (parts.items, lengths, qkv, layer.reshape(1), window.reshape(1), page_table)
    arrays, tree = jax.tree.flatten(pages)
    written = arrays if writes else []

    def kernel(*refs: Any) -> None:
        items, lengths, qkv, layer, window, table = refs[: len(operands)]
        rest = refs[len(operands) + len(arrays) :]
        kept = rest[len(outs) :] if writes else refs[len(operands) : len(operands) + len(arrays)]
        cache = _Cache(layer, window, table, *jax.tree.unflatten(tree, kept))
        newest = (qkv, heads - 2 * K) if writes else None
        _decode_kernel(items, lengths, qkv, cache, *rest[: len(outs)], shape=shape, newest=newest)

    found = pl.pallas_call(
        kernel,
        grid=(W, K),
        out_shape=[*outs, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in written)],
        input_output_aliases={len(operands) + i: len(outs) + i for i in range(len(written))},
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="paged_attention_decode",
    )(*operands, *arrays)
    out, acc, largest, total = found[: len(outs)]
    kept = jax.tree.unflatten(tree, found[len(outs) :]) if writes else pages
    return DecodedParts(parts.rows, acc, largest, total, out), kept


def ragged_attention(
    qkv: Float[Array, "T heads H"],
    pages: KVPages,
    blocks: QueryBlocks,
    out: Float32[Array, "T N H"],
    tiles: AttentionTiles,
    *,
    layer: Int32[Array, ""],
    page_table: Int32[Array, "B W"],
    window: Int32[Array, ""],
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> Float32[Array, "T N H"]:
    """Causal attention of the tokens that `blocks` cover, written into `out`, which is donated.

    Arguments as in `paged_attention.ragged_attention`, but that the queries are the first heads of `qkv`; blocks are of
    as many tokens as `tiles` has rows for. Those without a context, which `padded_query_blocks` adds, get zeros.
    """
    N, (T, _, H) = _query_heads(qkv, pages), qkv.shape
    K = pages.k.shape[2]
    shape = _shape(N, pages, tiles, scale, softcap, interpret)
    operands = (blocks.row, blocks.token, blocks.size, blocks.position, qkv, _cache(pages, layer, window, page_table))
    return pl.pallas_call(
        partial(_prefill_kernel, shape=shape),
        grid=(blocks.row.shape[0], K),
        out_shape=jax.ShapeDtypeStruct((T, N, H), jnp.float32),
        input_output_aliases={len(jax.tree.leaves(operands)): 0},
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="paged_attention_prefill",
    )(*operands, out)


def _query_heads(qkv: Float[Array, "T heads H"], pages: KVPages) -> int:
    """How many of a step's heads are queries: those in front of K and V."""
    return qkv.shape[1] - 2 * pages.k.shape[2]


def _shape(
    num_heads: int, pages: KVPages, tiles: AttentionTiles, scale: float, softcap: float | None, interpret: bool
) -> _Shape:
    K, S, H = pages.k.shape[2:]
    G, form = num_heads // K, format_of(pages)
    # Three products of TF32 make one of float32. A CPU knows no TF32.
    exact = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return _Shape(
        G=G,
        S=S,
        H=H,
        width=pl.next_power_of_2(H),
        rows=tiles.rows,
        span=tiles.span,
        scale=scale,
        softcap=softcap,
        form=form,
        precision=exact if _operands(form) == jnp.float32 else None,
        assembly=not interpret,
    )


def _operands(form: KVFormat) -> Any:
    """Type that products take. Each holds the codes exactly; they are what codes become in the fewest operations."""
    if form.largest is None:
        return form.codes
    return jnp.bfloat16 if form.codes == jnp.int8 else jnp.float16


def _cache(pages: KVPages, layer: Array, window: Array, page_table: Array) -> _Cache:
    return _Cache(layer.reshape(1), window.reshape(1), page_table, *pages)


def _decode_kernel(
    items: Any,
    lengths: Any,
    q: Any,
    cache: _Cache,
    out: Any,
    acc: Any,
    largest: Any,
    total: Any,
    *,
    shape: _Shape,
    newest: tuple[Any, int] | None,
) -> None:
    """One part of one row's context, for the query heads of one kv head. `newest`: what K and V of the row's last token
    are to be taken from, and which of its heads is K's first."""
    item, head = pl.program_id(0), pl.program_id(1)
    row, num_parts = items[item, 0], items[item, 3]

    @pl.when(num_parts > 0)
    def _() -> None:
        stop = lengths[row]
        start = jnp.maximum(stop - cache.window[0], 0)
        if newest is not None:
            is_last = (items[item, 2] * shape.span >= stop) & (stop > 0)
            _put_newest(*newest, cache, shape, row, head, stop - 1, is_last)
        group = jnp.arange(shape.rows, dtype=jnp.int32)
        heads, dims = head * shape.G + group, jnp.arange(shape.width, dtype=jnp.int32)
        is_head = group < shape.G
        inside = is_head[:, None] & (dims < shape.H)[None]
        tile = (row, heads[:, None], dims[None])
        queries = plt.load(q.at[tile], mask=inside, other=0.0).astype(_operands(shape.form))
        blocks = jnp.maximum(items[item, 1], lax.div(start, shape.span)), items[item, 2]
        state = _walk(
            queries, _empty(shape, group.shape[0]), cache, shape, _Place(cache.layer[0], row, head, start, stop), blocks
        )
        alone = num_parts == 1
        plt.store(out.at[tile], _finish(state), mask=inside & alone)
        plt.store(acc.at[item, heads[:, None], dims[None]], state.acc, mask=inside & ~alone)
        plt.store(largest.at[item, heads], state.largest * shape.unit, mask=is_head & ~alone)
        plt.store(total.at[item, heads], state.total, mask=is_head & ~alone)


def _put_newest(
    qkv: Any, first: int, cache: _Cache, shape: _Shape, row: Any, head: Any, position: Any, exists: Any
) -> None:
    """Writes a token where it will be read by the threads of this program, and by no other's: they wait for each other,
    and a barrier of theirs also orders what they wrote to memory before what they read from it.
    """
    page = plt.load(cache.table.at[row, lax.div(position, shape.S)[None]], mask=exists[None], other=0)
    at = cache.layer[0], page, lax.rem(position, shape.S)[None]
    pages = KVPages(cache.k, cache.v, cache.k_scale, cache.v_scale)
    put_head(pages, qkv, head, row[None], exists[None], at, H=shape.H, first=first, form=shape.form)
    if shape.assembly:
        plt.debug_barrier()


def _prefill_kernel(
    rows: Any, tokens: Any, sizes: Any, positions: Any, q: Any, cache: _Cache, _: Any, out: Any, *, shape: _Shape
) -> None:
    """One block of queries of one sequence, for the query heads of one kv head."""
    block, head = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1)  # a prompt's last blocks take longest
    size = sizes[block]

    @pl.when(size > 0)
    def _() -> None:
        position, window, span = positions[block], cache.window[0], shape.span
        pair = jnp.arange(shape.rows, dtype=jnp.int32)
        offset, dims = lax.div(pair, shape.G), jnp.arange(shape.width, dtype=jnp.int32)
        inside = (offset < size)[:, None] & (dims < shape.H)[None]
        heads = head * shape.G + lax.rem(pair, shape.G)
        tile = ((tokens[block] + offset)[:, None], heads[:, None], dims[None])
        queries = plt.load(q.at[tile], mask=inside, other=0.0).astype(_operands(shape.form))
        # The context lies between what the first query sees first and what the last one sees last. Blocks that all
        # queries see whole need no mask: those from `clear` to `ragged`.
        start, stop = jnp.maximum(position - window + 1, 0), jnp.maximum(position + size, 0)
        first, last = lax.div(start, span), pl.cdiv(stop, span)
        clear = jnp.minimum(pl.cdiv(jnp.maximum(position + size - window, 0), span), last)
        ragged = jnp.maximum(lax.div(jnp.maximum(position + 1, 0), span), clear)
        walk = partial(
            _walk, queries, cache=cache, shape=shape, place=_Place(cache.layer[0], rows[block], head, start, stop)
        )

        def sees(at: Array) -> Array:
            return (at[None] <= (position + offset)[:, None]) & (at[None] > (position + offset - window)[:, None])

        state = walk(_empty(shape, shape.rows), blocks=(first, clear), sees=sees)
        state = walk(state, blocks=(clear, ragged), masked=False)
        state = walk(state, blocks=(ragged, last), sees=sees)
        plt.store(out.at[tile], _finish(state), mask=inside)


def _walk(
    queries: Array,
    state: _Softmax,
    cache: _Cache,
    shape: _Shape,
    place: _Place,
    blocks: tuple[Array, Array],
    *,
    sees: Callable[[Array], Array] | None = None,
    masked: bool = True,
) -> _Softmax:
    """Attends to some blocks of a context.

    Args:
        queries: `[M, width]`.
        state: so far.
        cache: what is read.
        shape: static sizes.
        place: whose context.
        blocks: first, and behind the last.
        sees: positions of some tokens to whether each query sees each of them, `[M, tokens]`; None: all that the place
            has.
        masked: False: all queries see all of these blocks.
    """

    def step(block: Array, state: _Softmax) -> _Softmax:
        tokens = _tokens(block, cache, shape, place, masked=masked)
        logits = plt.dot(queries, _vectors(cache.k, tokens, shape, place), trans_b=True, precision=shape.precision)
        if cache.k_scale is not None:
            logits = logits * _scales(cache.k_scale, tokens, place)[None]
        if shape.softcap is not None:
            logits = _capped(logits, shape.scale, shape.softcap)
        if masked:
            seen = tokens.seen[None] if sees is None else tokens.seen[None] & sees(tokens.at)
            logits = jnp.where(seen, logits, NEVER)
        largest = jnp.maximum(state.largest, jnp.max(logits, axis=1))
        # Where nothing was seen yet, what is subtracted must not be what it is subtracted from, less its rounding.
        less = jnp.where(largest > NEVER, largest * shape.unit, 0.0)
        weights = _powers(logits, shape, jnp.broadcast_to(less[:, None], logits.shape))
        decay = jnp.exp2((state.largest - largest) * shape.unit)
        total = state.total * decay + jnp.sum(weights, axis=1)
        largest_scale = None
        if cache.v_scale is not None:
            by_token = _scales(cache.v_scale, tokens, place)
            if _operands(shape.form) == jnp.float16:  # which knows no small numbers: the largest scale becomes 1
                largest_scale = jnp.maximum(jnp.max(by_token, axis=0), _SMALLEST_UNIT)
                by_token = by_token / largest_scale
            weights = weights * by_token[None]
        vectors = _vectors(cache.v, tokens, shape, place)
        # One expression, so that the product is summed where the state lies.
        acc = state.acc * (decay if largest_scale is None else decay / largest_scale)[:, None] + plt.dot(
            weights.astype(vectors.dtype), vectors, precision=shape.precision
        )
        return _Softmax(acc if largest_scale is None else acc * largest_scale, largest, total)

    return lax.fori_loop(*blocks, step, state)


def _tokens(block: Array, cache: _Cache, shape: _Shape, place: _Place, *, masked: bool) -> _Tokens:
    """The tokens of one block of a context."""
    at = block * shape.span + jnp.arange(shape.span, dtype=jnp.int32)
    seen = (at >= place.start) & (at < place.stop) if masked else jnp.full(shape.span, True)
    if shape.span <= shape.S:  # one page holds them all
        page = cache.table[place.row, lax.div(block * shape.span, shape.S)]
    else:
        page = plt.load(cache.table.at[place.row, lax.div(at, shape.S)], mask=seen, other=0)
    return _Tokens(at, seen, page, lax.rem(at, shape.S))


def _vectors(cache: Any, tokens: _Tokens, shape: _Shape, place: _Place) -> Array:
    """K or V of some tokens, `[tokens, width]`, as products take them; zeros where unseen."""
    dims = jnp.arange(shape.width, dtype=jnp.int32)
    page = tokens.page[:, None] if tokens.page.ndim else tokens.page
    stored = plt.load(
        cache.at[place.layer, page, place.head, tokens.slot[:, None], dims[None]],
        mask=tokens.seen[:, None] & (dims < shape.H)[None],
        other=0.0 if jnp.issubdtype(cache.dtype, jnp.floating) else 0,  # of the array's own kind
    )
    return decode(stored, shape.form).astype(_operands(shape.form))


def _scales(scales: Any, tokens: _Tokens, place: _Place) -> Array:
    """Of the vectors of some tokens; zeros where unseen."""
    return plt.load(scales.at[place.layer, tokens.page, place.head, tokens.slot], mask=tokens.seen, other=0.0)


def _capped(products: Array, scale: float, softcap: float) -> Array:
    """Logits, with tanh(x) = 1 − 2 / (e^2x + 1)."""
    power = jnp.exp2(products * (scale / softcap * 2 * _LOG2E))
    return softcap * (1.0 - 2.0 / (power + 1.0))


def _powers(logits: Array, shape: _Shape, less: Array) -> Array:
    """2 to the power of (unit · logits − less)."""
    if not shape.assembly:
        return jnp.exp2(logits * shape.unit - less)
    [bits] = np.float32(shape.unit).reshape(1).view(np.uint32)
    text = f"{{ .reg .f32 t; neg.f32 t, $2; fma.rn.f32 t, $1, 0f{bits:08x}, t; ex2.approx.ftz.f32 $0, t; }}"
    out = jax.ShapeDtypeStruct(logits.shape, jnp.float32)
    [powers] = plt.elementwise_inline_asm(
        text, args=[logits, less], constraints="=f,f,f", pack=1, result_shape_dtypes=[out]
    )
    return powers


def _empty(shape: _Shape, M: int) -> _Softmax:
    return _Softmax(
        jnp.zeros((M, shape.width), jnp.float32), jnp.full(M, NEVER, jnp.float32), jnp.zeros(M, jnp.float32)
    )


def _finish(state: _Softmax) -> Array:
    return state.acc / jnp.where(state.total > 0, state.total, 1.0)[:, None]
