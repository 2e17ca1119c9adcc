"""Prefill over a paged KV cache as a Pallas kernel for Hopper (Mosaic GPU), whose warps share the work out. What it
computes is `paged_attention.py`'s to say. `ops` takes it in place of `paged_attention_pallas.py`'s where a device's
tuned tiles say so.

A group of four warps copies pages into shared memory. Two others multiply, 64 rows of queries each, and take turns: one
has the matrix units while the other makes weights of its logits (FlashAttention-3, arXiv:2407.08608 §3.1). Rows are
pairs of a query head of one kv head's group and a token, all tokens of a head in a row: a copy for each head brings
them. Copies cannot mask, so that a block's results leave in runs of powers of two, as many as it has tokens.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention_work import QueryBlocks
from pallas_kernels.kv_pages import KVPages
from pallas_kernels.paged_attention import NEVER
from pallas_kernels.tuning import AttentionTiles

_MULTIPLY = 2  # groups of warps that do
_GROUP_ROWS = 64  # what a product of one has
_MEMORY = _MULTIPLY  # the group behind them
ROWS = _MULTIPLY * _GROUP_ROWS  # of a tile of queries
WARPS = 4 * (_MULTIPLY + 1)
_REGISTERS = 232, 40  # of a thread that multiplies, and of one that copies
_STAGED_WHOLE = 128  # numbers of a vector, up to which shared memory has room to stage all of them
_LOG2E = math.log2(math.e)


class _Shape(NamedTuple):
    """Static sizes of one call."""

    G: int  # query heads of a kv head
    K: int
    P: int
    S: int
    H: int
    width: int  # pages of a page table
    tokens: int  # of a block of queries
    num_blocks: int
    span: int  # tokens of context in a block
    stages: int  # of blocks of the context that are copied ahead
    scale: float
    softcap: float | None
    dtype: Any  # that products take
    interpret: bool

    @property
    def unit(self) -> float:
        """Of logits as they are compared, in ln 2."""
        return _LOG2E * (self.scale if self.softcap is None else 1.0)

    @property
    def nothing(self) -> float:
        """The largest logit, as it is compared, where nothing was seen yet."""
        return NEVER * self.unit

    @property
    def columns(self) -> int:
        """Of numbers that are staged at once."""
        return self.H if self.H <= _STAGED_WHOLE else 64


class _Memory(NamedTuple):
    """References to what all programs read and write."""

    row: Any  # of each block of queries, like the next three: i32 [blocks]
    token: Any
    size: Any
    position: Any
    qkv: Any  # f32 [T, heads, H]
    layer: Any  # i32 [1]
    window: Any  # i32 [1]
    table: Any  # i32 [B, W]
    k: Any  # [L · P · K, S, H]
    v: Any
    out: Any  # f32 [T, N, H]


class _Shared(NamedTuple):
    """Shared memory of a program, and its barriers: `…_here` when something was copied, `…_free` when it was used."""

    queries: Any  # [groups, rows, H]
    k: Any  # [stages, span, H]
    v: Any
    staged: Any  # f32 [ROWS, columns]
    queries_here: tuple[Any, ...]  # one for each group that multiplies
    k_here: Any  # one for each stage, like the next three
    v_here: Any
    k_free: Any
    v_free: Any
    turn: Any  # of the groups that multiply
    weights: Any = None  # [groups, rows, span], where products cannot take them from registers


class _Block(NamedTuple):
    """A block of queries and what they see: scalars. Blocks of the context are counted in spans."""

    row: Array  # of the page table
    token: Array  # first one, in the flat batch
    size: Array
    position: Array  # of the first token
    window: Array
    stop: Array  # behind the last position that any of them sees
    first: Array  # block that any of them sees
    clear: Array  # from here on all see all
    ragged: Array  # up to here
    last: Array  # behind the last block

    @property
    def turns(self) -> Array:
        """As many as there are blocks of the context."""
        return self.last - self.first

    @property
    def masked(self) -> Array:
        """Of those that not every query sees whole: they are taken first, so that there is one loop of them."""
        return self.clear - self.first + self.last - self.ragged

    def taken(self, turn: Array) -> Array:
        """The block of the context that comes at this turn."""
        edge = turn - (self.clear - self.first)  # behind those in front of the clear ones
        inner = jnp.where(turn < self.masked, self.ragged + edge, self.clear + turn - self.masked)
        return jnp.where(edge < 0, self.first + turn, inner)


class _Run(NamedTuple):
    """Rows of a group of warps that are tokens of one head."""

    head: int  # of the kv head's group
    token: int  # first one, of the block
    row: int  # first one, of the tile
    size: int


class _Softmax(NamedTuple):
    """Running softmax of a group's rows: weighted sum of V, largest logit in `unit`s, sum of weights."""

    acc: Array  # f32 [rows, H]
    largest: Array  # f32 [rows]
    total: Array  # f32 [rows]


def tiles_that_fit(head_dim: int) -> AttentionTiles:
    """Tiles that fit: what tuning starts from."""
    span = 128 if head_dim <= _STAGED_WHOLE else 64
    return AttentionTiles(rows=ROWS, span=span, warps=WARPS, stages=2, kernel="mosaic")


def why_not(pages: KVPages, num_heads: int, num_tokens: int, tiles: AttentionTiles) -> str | None:
    """What the kernel does not have of a cache, query heads, tokens of a step and tiles; None: it has all of it."""
    K, S, H = pages.k.shape[2:]
    G, dtype = num_heads // K, pages.k.dtype
    has = (
        (dtype in (jnp.bfloat16, jnp.float16), f"a cache of {dtype}, must be bfloat16 or float16"),
        (H % 64 == 0 and H <= 256, f"a head dim of {H}, must be a multiple of 64 up to 256"),
        (S % 8 == 0, f"pages of {S} tokens, must be a multiple of 8"),
        (tiles.rows == ROWS, f"tiles.rows {tiles.rows}, must be {ROWS}"),
        (tiles.warps == WARPS, f"tiles.warps {tiles.warps}, must be {WARPS}"),
        # With one, V comes only after the product that a masked block waits for it in front of.
        (tiles.stages >= 2, f"tiles.stages {tiles.stages}, must be at least 2"),
        (tiles.span % 64 == 0 and tiles.span <= 256, f"tiles.span {tiles.span}, must be a multiple of 64 up to 256"),
        (tiles.span % S == 0, f"pages of {S} tokens, must divide tiles.span, {tiles.span}"),
        (G <= ROWS, f"{G} query heads a kv head, must be at most {ROWS}"),
        (num_tokens >= ROWS // G, f"steps of {num_tokens} tokens, must be at least the {ROWS // G} of a block"),
    )
    return next((says for is_so, says in has if not is_so), None)


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
    interpret: Any = False,
) -> Float32[Array, "T N H"]:
    """As `paged_attention_pallas.ragged_attention`, inside of `jax.jit` alone. `interpret`: parameters of Mosaic GPU's
    own interpreter, which knows no products of registers: weights go through shared memory there.

    Raises:
        ValueError: `why_not` says something.
    """
    (T, N, _), (L, P, K, S, H) = out.shape, pages.k.shape
    if missing := why_not(pages, N, T, tiles):
        raise ValueError(f"Mosaic GPU's attention does not take {missing}; paged_attention_pallas.py has one")
    shape = _Shape(
        G=N // K,
        K=K,
        P=P,
        S=S,
        H=H,
        width=page_table.shape[1],
        tokens=ROWS // (N // K),
        num_blocks=blocks.row.shape[0],
        span=tiles.span,
        stages=tiles.stages,
        scale=scale,
        softcap=softcap,
        dtype=pages.k.dtype,
        interpret=bool(interpret),
    )

    def body(*refs: Any) -> None:
        attend = partial(_kernel, _Memory(*refs), shape=shape)
        pl.run_scoped(attend, _scratch(shape), collective_axes="group")

    # A page of a kv head is what a copy brings: three dimensions, as copies have at most five, and tiles take two more.
    k, v = (array.reshape(L * P * K, S, H) for array in (pages.k, pages.v))
    written = jax.new_ref(out, memory_space=plgpu.GMEM)
    places = blocks.row, blocks.token, blocks.size, blocks.position
    kernel: Any = pl.kernel(
        body,
        out_type=(),
        mesh=plgpu.Mesh(
            grid=(shape.num_blocks, K), grid_names=("block", "head"), num_threads=_MULTIPLY + 1, thread_name="group"
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        name="paged_attention_prefill",
    )
    kernel(*places, qkv.astype(jnp.float32), layer.reshape(1), window.reshape(1), page_table, k, v, written)
    return jax.freeze(written)


def _scratch(shape: _Shape) -> _Shared:
    """The types of a program's shared memory."""
    # Products read it without conflicts of banks: tiles of 8 rows of 128 bytes.
    tiled = partial(
        plgpu.SMEM, dtype=shape.dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    )
    pages = tiled((shape.stages, shape.span, shape.H))
    here = plgpu.Barrier(num_arrivals=shape.span // shape.S, num_barriers=shape.stages)
    free = plgpu.Barrier(num_arrivals=_MULTIPLY, num_barriers=shape.stages)
    return _Shared(
        queries=tiled((_MULTIPLY, _GROUP_ROWS, shape.H)),
        k=pages,
        v=pages,
        staged=plgpu.SMEM((ROWS, shape.columns), jnp.float32),
        queries_here=tuple(plgpu.Barrier(num_arrivals=len(_runs(shape, group))) for group in range(_MULTIPLY)),
        k_here=here,
        v_here=here,
        k_free=free,
        v_free=free,
        turn=plgpu.Barrier(num_arrivals=_MULTIPLY),
        weights=tiled((_MULTIPLY, _GROUP_ROWS, shape.span)) if shape.interpret else None,
    )


def _runs(shape: _Shape, group: int) -> list[_Run]:
    """What rows a group of warps has."""
    begin, end = group * _GROUP_ROWS, (group + 1) * _GROUP_ROWS
    found: list[_Run] = []
    for head in range(shape.G):
        of_head = head * shape.tokens
        row, stop = max(of_head, begin), min(of_head + shape.tokens, end)
        if row < stop:
            found.append(_Run(head, row - of_head, row, stop - row))
    return found


def _kernel(memory: _Memory, shared: _Shared, *, shape: _Shape) -> None:
    """One block of queries of one sequence, for the query heads of one kv head."""
    index = shape.num_blocks - 1 - lax.axis_index("block")  # a prompt's last blocks take longest
    head, group = lax.axis_index("head"), lax.axis_index("group")
    is_block = memory.size[index] > 0

    @pl.when(is_block & (group == _MEMORY))
    def _() -> None:
        plgpu.set_max_registers(_REGISTERS[1], action="decrease")
        _copy_context(memory, shared, shape, _block(memory, shape, index), head)

    @pl.when(is_block & (group < _MULTIPLY))
    def _() -> None:
        plgpu.set_max_registers(_REGISTERS[0], action="increase")
        block = _block(memory, shape, index)
        _take_queries(memory, shared, shape, block, head, group)
        state = _walk(shared, shape, block, group)
        _put(memory, shared, shape, block, head, group, state)


def _block(memory: _Memory, shape: _Shape, index: Array) -> _Block:
    """Asked for by each group of warps for itself: what is known before they part takes registers of all of them."""
    size, position, window, span = memory.size[index], memory.position[index], memory.window[0], shape.span
    start, stop = jnp.maximum(position - window + 1, 0), jnp.maximum(position + size, 0)
    last = pl.cdiv(stop, span)
    clear = jnp.minimum(pl.cdiv(jnp.maximum(position + size - window, 0), span), last)
    ragged = jnp.maximum(lax.div(jnp.maximum(position + 1, 0), span), clear)
    row, token = memory.row[index], memory.token[index]
    return _Block(row, token, size, position, window, stop, lax.div(start, span), clear, ragged, last)


def _copy_context(memory: _Memory, shared: _Shared, shape: _Shape, block: _Block, head: Array) -> None:
    """Brings K and V, as many blocks ahead as there are stages. What lies behind a context's end may be any page."""
    base, stages, pages = memory.layer[0] * shape.P, shape.stages, shape.span // shape.S

    def bring(cache: Any, shared: Any, found: list[Array], turn: Array, here: Any, free: Any) -> None:
        stage = lax.rem(turn, stages)

        @pl.when(turn >= stages)
        def _() -> None:
            plgpu.barrier_wait(free.at[stage])

        for i, page in enumerate(found):
            to = shared.at[stage, pl.ds(i * shape.S, shape.S)]
            plgpu.copy_gmem_to_smem(cache.at[page], to, here.at[stage])

    @pl.loop(0, block.turns)
    def _(turn: Array) -> None:
        entry = block.taken(turn) * pages
        entries = [memory.table[block.row, jnp.minimum(entry + i, shape.width - 1)] for i in range(pages)]
        found = [(base + page) * shape.K + head for page in entries]
        bring(memory.k, shared.k, found, turn, shared.k_here, shared.k_free)
        bring(memory.v, shared.v, found, turn, shared.v_here, shared.v_free)

    @pl.loop(jnp.maximum(0, block.turns - stages), block.turns)
    def _(turn: Array) -> None:  # no barrier is left with an arrival that nobody saw
        plgpu.barrier_wait(shared.k_free.at[lax.rem(turn, stages)])
        plgpu.barrier_wait(shared.v_free.at[lax.rem(turn, stages)])


def _take_queries(memory: _Memory, shared: _Shared, shape: _Shape, block: _Block, head: Array, group: Array) -> None:
    """Brings a group's queries, and rounds them to what products take."""

    @pl.loop(0, shape.H // shape.columns)
    def _(part: Array) -> None:
        columns = pl.ds(pl.multiple_of(part * shape.columns, shape.columns), shape.columns)
        for g, here in enumerate(shared.queries_here):

            @pl.when(group == g)
            def _(g: int = g, here: Any = here) -> None:
                for run in _runs(shape, g):
                    tokens = pl.ds(block.token + run.token, run.size)
                    queries = memory.qkv.at[tokens, head * shape.G + run.head, columns]
                    plgpu.copy_gmem_to_smem(queries, shared.staged.at[pl.ds(run.row, run.size)], here)
                plgpu.barrier_wait(here)

        rows = shared.staged[pl.ds(group * _GROUP_ROWS, _GROUP_ROWS)]
        shared.queries[group, :, columns] = rows.astype(shape.dtype)
        plgpu.commit_smem()


def _walk(shared: _Shared, shape: _Shape, block: _Block, group: Array) -> _Softmax:
    """Attends to all blocks of the context."""

    def take_turn() -> None:
        plgpu.barrier_arrive(shared.turn)
        plgpu.barrier_wait(shared.turn)

    def wait_for_k(turn: Array) -> None:
        @pl.when(turn < block.turns)
        def _() -> None:
            plgpu.barrier_wait(shared.k_here.at[lax.rem(turn, shape.stages)])

    def step(turn: Array, state: _Softmax, *, masked: bool) -> _Softmax:
        stage = lax.rem(turn, shape.stages)
        place = block.taken(turn) * shape.span
        if masked:
            plgpu.barrier_wait(shared.v_here.at[stage])
            _forget_unused(shared.v, stage, block.stop - place, shape)

        def multiply_queries(ref: Any) -> Array:
            plgpu.wgmma(ref, shared.queries.at[group], shared.k.at[stage].transpose((1, 0)))
            take_turn()
            return ref[...]

        logits = pl.run_scoped(multiply_queries, plgpu.WGMMAAccumulatorRef((_GROUP_ROWS, shape.span), jnp.float32))
        plgpu.barrier_arrive(shared.k_free.at[stage])
        if shape.softcap is not None:
            power = jnp.exp2(logits * (shape.scale / shape.softcap * 2 * _LOG2E))
            logits = shape.softcap * (1.0 - 2.0 / (power + 1.0))  # tanh
        if masked:
            logits = jnp.where(_seen(block, shape, group, place), logits, NEVER)
        largest = jnp.maximum(state.largest, jnp.max(logits, axis=1) * shape.unit)
        # Where nothing was seen yet, what is subtracted must not be what it is subtracted from: fused with the product,
        # that would leave the rounding of a huge number, whose power is infinite.
        less = jnp.where(largest > shape.nothing / 2, largest, 0.0) if masked else largest
        weights = jnp.exp2(logits * shape.unit - _by_row(less, logits))
        decay = jnp.exp2(state.largest - largest)
        acc = state.acc * _by_row(decay, state.acc)
        total = state.total * decay + jnp.sum(weights, axis=1)
        rounded = weights.astype(shape.dtype)
        # All of this before the other group's turn ends.
        acc, total, largest, rounded = lax.optimization_barrier((acc, total, largest, rounded))
        plgpu.barrier_arrive(shared.turn)
        if not masked:
            plgpu.barrier_wait(shared.v_here.at[stage])
        plgpu.barrier_wait(shared.turn)
        acc = _add_values(acc, rounded, shared, shape, group, stage, lambda: wait_for_k(turn + 1))
        plgpu.barrier_arrive(shared.v_free.at[stage])
        return _Softmax(acc, largest, total)

    zeros = partial(jnp.full, fill_value=0.0, dtype=jnp.float32)
    state = _Softmax(
        zeros((_GROUP_ROWS, shape.H)), jnp.full(_GROUP_ROWS, shape.nothing, jnp.float32), zeros(_GROUP_ROWS)
    )
    wait_for_k(jnp.int32(0))
    pl.when(group == 1)(take_turn)  # it is half a step behind
    state = lax.fori_loop(0, block.masked, partial(step, masked=True), state)
    state = lax.fori_loop(block.masked, block.turns, partial(step, masked=False), state)
    pl.when(group == 0)(take_turn)
    return state


def _forget_unused(values: Any, stage: Array, used: Array, shape: _Shape) -> None:
    """Makes zeros of V behind a context's end, as 0 · NaN is NaN. Both groups do, each before its own turn, so that
    either has been through before the other's product."""

    @pl.when(used < shape.span)
    def _() -> None:
        is_used = lax.broadcasted_iota(jnp.int32, (shape.span, 64), 0) < used
        for column in range(0, shape.H, 64):  # few at once, as all of them would need too many registers
            columns = pl.ds(column, 64)
            values[stage, :, columns] = jnp.where(is_used, values[stage, :, columns], jnp.zeros((), shape.dtype))
        plgpu.commit_smem()


def _seen(block: _Block, shape: _Shape, group: Array, place: Array) -> Array:
    """Whether each of a group's queries sees each token of the context's block that begins at `place`."""
    tile = _GROUP_ROWS, shape.span
    row = lax.broadcasted_iota(jnp.int32, tile, 0) + group * _GROUP_ROWS
    at = lax.broadcasted_iota(jnp.int32, tile, 1)
    own = lax.rem(row, shape.tokens) + (block.position - place)
    return (at <= own) & (at > own - block.window)


def _add_values(
    acc: Array, weights: Array, shared: _Shared, shape: _Shape, group: Array, stage: Array, meanwhile: Any
) -> Array:
    """The weighted sum of V added to what there is; `meanwhile` is called while it is under way."""
    values = shared.v.at[stage]
    if not shape.interpret:

        def add(ref: Any) -> None:
            plgpu.wgmma(ref, weights, values)
            meanwhile()

        added: Any = pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(acc))
        return added

    def product(ref: Any) -> Array:
        plgpu.wgmma(ref, shared.weights.at[group], values)
        return ref[...]

    shared.weights[group] = weights
    plgpu.commit_smem()
    meanwhile()
    return acc + pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((_GROUP_ROWS, shape.H), jnp.float32))


def _put(
    memory: _Memory, shared: _Shared, shape: _Shape, block: _Block, head: Array, group: Array, state: _Softmax
) -> None:
    """Writes a group's results: those of tokens behind the block's end are another block's."""
    out = state.acc / _by_row(jnp.where(state.total > 0, state.total, 1.0), state.acc)
    for column in range(0, shape.H, shape.columns):
        columns = pl.ds(column, shape.columns)
        shared.staged[pl.ds(group * _GROUP_ROWS, _GROUP_ROWS)] = out[:, column : column + shape.columns]
        plgpu.commit_smem()
        for g in range(_MULTIPLY):

            @pl.when(group == g)
            def _(g: int = g, columns: Any = columns) -> None:
                for run in _runs(shape, g):
                    to = memory.out.at[:, head * shape.G + run.head, columns]
                    _put_run(shared.staged, to, run, block)

        plgpu.wait_smem_to_gmem(0)


def _put_run(staged: Any, out: Any, run: _Run, block: _Block) -> None:
    """Writes the tokens of a run that the block has, in as few copies as powers of two take: a copy's size is fixed."""
    count = jnp.clip(block.size - run.token, 0, run.size)
    for length in _powers_of_2(run.size):
        done = lax.div(count, 2 * length) * (2 * length)

        @pl.when(lax.rem(lax.div(count, length), 2) == 1)
        def _(length: int = length, done: Array = done) -> None:
            to = out.at[pl.ds(block.token + run.token + done, length)]
            plgpu.copy_smem_to_gmem(staged.at[pl.ds(run.row + done, length)], to)


def _powers_of_2(most: int) -> Iterator[int]:
    """Down from the largest that is not more."""
    return (1 << bit for bit in reversed(range(most.bit_length())))


def _by_row(values: Array, like: Array) -> Array:
    return lax.broadcast_in_dim(values, like.shape, (0,))
