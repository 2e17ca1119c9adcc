"""The device's side of a step: one function from weights, state and a packed batch to tokens and new state.

Look-up of tokens, forward pass, sampling, and the tokens that the next step reads: all in one program, which donates
the state. Compiling and calling it is `runner.py`'s.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int32

from atoma_jax import ops
from atoma_jax.engine.batch import BatchFields, unpack
from atoma_jax.engine.buckets import Program
from atoma_jax.engine.sampler import sample, score
from atoma_jax.engine.sampler_state import SamplerShape, SamplerState, init_state
from atoma_jax.engine.sampling_rows import decode_rows
from atoma_jax.engine.vocab_shards import VocabShards
from atoma_jax.model_spec import KVDtype, ModelSpec
from atoma_jax.models.decoder import Decoder

Weights: TypeAlias = Any  # an `nnx.State`, whose own type cannot be checked at run time


@no_type_check  # JAX also fills it with abstract values
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """Everything that lives on the device from step to step."""

    pages: ops.KVPages
    sampler: SamplerState


@no_type_check  # JAX also fills it with abstract values
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What the host reads. Logprobs are read only for requests that asked for them."""

    tokens_ok: Int32[Array, "2 Q"]  # tokens, then 1 where the row's logits were finite: one copy for both
    logprob: Array  # f32 [Q], of the token
    rank: Int32[Array, " Q"]
    top_ids: Int32[Array, "Q n"]
    top_logprobs: Array  # f32 [Q, n]
    pooled: Array | None = None  # f32 [B, D], of programs that pool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """Sizes that all programs of an engine share."""

    table_width: int  # pages of a page table
    page_size: int
    max_logprobs: int
    fixed_parts: bool  # attention cuts a context alike whatever else the step holds
    pooling: Literal["last", "mean"] = "last"  # of programs that pool


def make_state(
    spec: ModelSpec, sampler: SamplerShape, backend: ops.Backend, *, num_pages: int, page_size: int, kv_dtype: KVDtype
) -> EngineState:
    """An empty state."""
    shape = (spec.num_layers, num_pages, spec.num_kv_heads, page_size, spec.head_dim)
    return EngineState(pages=ops.empty_pages(shape, kv_dtype, backend), sampler=init_state(sampler))


def run_step(
    weights: Weights,
    state: EngineState,
    words: Int32[Array, " words"],
    *,
    graph: Any,
    program: Program,
    sizes: StepSizes,
) -> tuple[EngineState, StepOutput]:
    """One step of `program`.

    Args:
        weights: of the model; kept.
        state: donated.
        words: `batch.pack`'s array.
        graph: the model's `nnx.GraphDef`; static.
        program: which; static.
        sizes: static.
    """
    model: Decoder = nnx.merge(graph, weights)
    batch = unpack(words, program, sizes.table_width)
    tokens = _input_tokens(batch, state.sampler)
    attention = _attention_batch(model, state.pages, batch, program, sizes)
    hidden, pages = model.hidden(tokens, batch.position, state.pages, attention)
    if program.kind == "pool":
        return EngineState(pages=pages, sampler=state.sampler), _pooled(model, hidden, batch, sizes)
    logits = model.logits(model.rows(hidden, batch.logit_token, program.tokens))
    with jax.named_scope("sample"):
        rows, shards = decode_rows(batch.sampling), VocabShards(model.backend.mesh)
        number, native = sizes.max_logprobs, model.backend.draws_natively
        if program.kind == "score":
            out, sampler = score(logits, rows, max_logprobs=number, shards=shards, native=native), state.sampler
        else:
            out, sampler = sample(logits, rows, state.sampler, max_logprobs=number, shards=shards, native=native)
    return EngineState(pages=pages, sampler=sampler), StepOutput(
        tokens_ok=jnp.stack([out.tokens, out.ok.astype(jnp.int32)]),
        logprob=out.logprob,
        rank=out.rank,
        top_ids=out.top_ids,
        top_logprobs=out.top_logprobs,
    )


def _pooled(model: Decoder, hidden: Array, batch: BatchFields, sizes: StepSizes) -> StepOutput:
    """The prompts' vectors, of hidden states behind the final norm. Nothing is sampled."""
    with jax.named_scope("pool"):
        if sizes.pooling == "last":
            pooled = model.normed(model.rows(hidden, batch.logit_token, hidden.shape[0]))  # [B, D]
        else:
            (B,), T = batch.chunk_count.shape, hidden.shape[0]
            row = jnp.where(jnp.arange(T) < batch.num_tokens[0], batch.row, B)  # padding: a row that is cut off
            sums = jax.ops.segment_sum(model.normed(hidden), row, num_segments=B + 1)[:B]
            pooled = sums / jnp.maximum(batch.chunk_count, 1)[:, None]
    ok = jnp.all(jnp.isfinite(pooled), axis=1).astype(jnp.int32)
    nothing = jnp.zeros_like(ok)
    none = jnp.zeros(0, jnp.float32)
    return StepOutput(
        tokens_ok=jnp.stack([nothing, ok]), logprob=none, rank=nothing, top_ids=none, top_logprobs=none, pooled=pooled
    )


def _input_tokens(batch: BatchFields, sampler: SamplerState) -> Int32[Array, " T"]:
    """Given tokens, and for rows whose input is still on the device the last one sampled in their slot; -1: padding."""
    from_slot = batch.from_slot[batch.row]  # [T]
    last = sampler.last_token[jnp.maximum(from_slot - 1, 0)]
    index = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32)
    return jnp.where(index < batch.num_tokens[0], jnp.where(from_slot > 0, last, batch.tokens), -1)


def _attention_batch(
    model: Decoder, pages: ops.KVPages, batch: BatchFields, program: Program, sizes: StepSizes
) -> ops.AttentionBatch:
    index = jnp.arange(program.tokens, dtype=jnp.int32)
    page = batch.page_table[batch.row, batch.position // sizes.page_size]
    chunks = ops.Chunks(batch.chunk_start, batch.chunk_count, batch.chunk_position)
    return ops.attention_batch(
        pages,
        model.spec.num_heads,
        model.backend,
        page=jnp.where(index < batch.num_tokens[0], page, 0),  # padding writes to the scratch page
        slot=batch.position % sizes.page_size,
        page_table=batch.page_table,
        decode_lengths=batch.decode_length,
        chunks=None if program.kind == "decode" else chunks,
        fixed_parts=sizes.fixed_parts,
    )
