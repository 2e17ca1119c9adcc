"""The engine's own step at the shapes of Llama-3.1-8B with random weights: decode at several rows, and prefill."""

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from atoma_jax.engine.batch import batch_size, unpack
from atoma_jax.engine.buckets import Program
from atoma_jax.engine.compile_options import compile_options
from atoma_jax.engine.sampler_state import SamplerShape
from atoma_jax.engine.step import EngineState, StepSizes, Weights, make_state, run_step
from atoma_jax.model_spec import ModelSpec
from atoma_jax.ops import Backend
from bench.gpu_sections.protocol import Context, Measurement
from bench.gpu_sections.timing import REPEATS, seconds_of
from bench.kernel_times import kernel_times, seconds_by_kernel
from bench.real_models import LLAMA_8B, TINY, abstract_values, graph_and_state, random_values, with_type

TYPES = ("bf16", "Q4_K", "Q8_0", "ternary")  # those that have pass marks first
DECODE_ROWS, PREFILL_TOKENS = (1, 8, 64, 256), (512, 2048)
CONTEXT, PAGE_SIZE = 1024, 16  # tokens of a sequence that decodes, this step included
PARTS = 12  # kernels that are told of each step, those that take longest
TARGETS = {"bf16": 0.80, "Q4_K": 0.55}  # of the bandwidth limit, at one row


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engine:
    spec: ModelSpec
    backend: Backend
    graph: Any
    weights: Weights
    sizes: StepSizes
    sampler: SamplerShape
    context: int

    @property
    def weight_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.weights))

    @property
    def read_bytes(self) -> int:
        """Of the weights, what a step reads: of the embedding a few rows."""
        return self.weight_bytes - 2 * self.spec.vocab_size * self.spec.dim


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A step: its program, its batch, the pages that it needs, and what is said of it but for the time."""

    program: Program
    words: np.ndarray
    pages: int
    measurement: Measurement


def measure(context: Context) -> Iterator[Measurement]:
    """Every type, at every number of rows. Raises RuntimeError at the end, where some could not be measured."""
    failed: list[str] = []
    for type_name in ("Q4_K",) if context.small else TYPES:
        engine = _engine(context, type_name)
        cases = [_decode(context, engine, type_name, rows) for rows in ((2,) if context.small else DECODE_ROWS)]
        cases += [_prefill(engine, type_name, tokens) for tokens in ((32,) if context.small else PREFILL_TOKENS)]
        for case, step in zip(cases, _compiled(engine, cases), strict=True):
            try:
                seconds, parts = _measured(engine, case, step)
            except jax.errors.JaxRuntimeError as error:  # most often: memory; other cases may have enough
                failed.append(f"{case.measurement.name}: {str(error)[:120]}")
                continue
            yield replace(case.measurement, seconds=seconds, parts=parts)
        del engine  # before the next weights are made
    if failed:
        raise RuntimeError("; ".join(failed))


def _engine(context: Context, type_name: str) -> _Engine:
    spec = with_type(TINY if context.small else LLAMA_8B, type_name)
    length = 64 if context.small else max(CONTEXT, *PREFILL_TOKENS)
    backend = Backend(
        platform="cpu" if context.small else "cuda",
        operands="bfloat16",
        weight_layout="planar",
        kernels=context.kernels,
        device=jax.devices()[0].device_kind,
    )
    graph, weights = graph_and_state(spec, backend, random_values(abstract_values(spec, type_name, backend)))
    return _Engine(
        spec=spec,
        backend=backend,
        graph=graph,
        weights=weights,
        sizes=StepSizes(table_width=length // PAGE_SIZE, page_size=PAGE_SIZE, max_logprobs=1, fixed_parts=False),
        sampler=SamplerShape(slots=max(DECODE_ROWS), vocab_size=spec.vocab_size, max_model_len=length),
        context=min(CONTEXT, length),
    )


def _decode(context: Context, engine: _Engine, type_name: str, rows: int) -> _Case:
    """A step of `rows` sequences whose context is full."""
    program = Program("decode", rows, rows)
    words = np.zeros(batch_size(program, engine.sizes.table_width), np.int32)
    batch = unpack(words, program, engine.sizes.table_width)
    pages = engine.context // PAGE_SIZE
    batch.num_tokens[0] = rows
    batch.row[:] = batch.logit_token[:] = np.arange(rows)
    batch.position[:] = engine.context - 1
    batch.decode_length[:] = engine.context
    batch.page_table[:, :pages] = 1 + np.arange(rows * pages).reshape(rows, pages)
    cache = rows * engine.context * engine.spec.kv_bytes_per_token("bfloat16")
    measurement = Measurement(
        name=f"decode, {type_name}, {rows} rows of {engine.context} tokens",
        seconds=math.nan,
        moved_bytes=engine.read_bytes + cache,
        operations=2 * rows * _parameters(engine.spec),
        tokens=rows,
        target=TARGETS.get(type_name) if rows == 1 and not context.small else None,
        fraction_of="bandwidth" if rows == 1 else "limit",
    )
    return _Case(program=program, words=words, pages=1 + rows * pages, measurement=measurement)


def _prefill(engine: _Engine, type_name: str, tokens: int) -> _Case:
    """A step that is one prompt."""
    program = Program("mixed", tokens, 1)
    words = np.zeros(batch_size(program, engine.sizes.table_width), np.int32)
    batch = unpack(words, program, engine.sizes.table_width)
    batch.num_tokens[0] = batch.chunk_count[0] = tokens
    batch.position[:] = np.arange(tokens)
    batch.logit_token[0] = tokens - 1
    batch.page_table[0] = 1 + np.arange(engine.sizes.table_width)
    spec = engine.spec
    attention = 2 * 2 * spec.num_layers * spec.num_heads * spec.head_dim * tokens * tokens // 2
    measurement = Measurement(
        name=f"prefill, {type_name}, {tokens} tokens",
        seconds=math.nan,
        moved_bytes=engine.read_bytes,
        operations=2 * tokens * (_parameters(spec) - spec.vocab_size * spec.dim) + attention,
        tokens=tokens,
    )
    return _Case(program=program, words=words, pages=1 + engine.sizes.table_width, measurement=measurement)


def _state(engine: _Engine, case: _Case) -> EngineState:
    return make_state(
        engine.spec, engine.sampler, engine.backend, num_pages=case.pages, page_size=PAGE_SIZE, kv_dtype="bfloat16"
    )


def _compiled(engine: _Engine, cases: list[_Case]) -> list[Any]:
    """The steps' programs, compiled at once: each keeps one core busy for seconds, and time is short."""
    lowered: list[Any] = []
    for case in cases:
        run = partial(run_step, graph=engine.graph, program=case.program, sizes=engine.sizes)
        state = jax.eval_shape(partial(_state, engine, case))
        lowered.append(jax.jit(run, donate_argnums=1).lower(engine.weights, state, case.words))
    options = compile_options(engine.backend.platform)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda one: one.compile(options), lowered))


def _measured(engine: _Engine, case: _Case, step: Any) -> tuple[float, dict[str, float]]:
    """Seconds of one step, and of its kernels: the state goes from step to step, as in the engine, and a run of steps
    is waited for once."""
    on_device = jax.device_put(case.words)
    held: list[EngineState] = [jax.jit(partial(_state, engine, case))()]

    def several(steps: int) -> Any:
        output = None
        for _ in range(steps):
            held[0], output = step(engine.weights, held[0], on_device)
        return output

    assert REPEATS > 1
    steps = 1 if engine.backend.platform == "cpu" else 10
    seconds = seconds_of(several, steps) / steps
    parts = seconds_by_kernel(kernel_times(partial(several, 1)))
    return seconds, dict(itertools.islice(parts.items(), PARTS))


def _parameters(spec: ModelSpec) -> int:
    """Of the matrices that every token goes through, the head among them."""
    D, F = spec.dim, spec.ffn_dim
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    return spec.num_layers * (heads * D + spec.num_heads * spec.head_dim * D + 3 * D * F) + math.prod(
        (spec.vocab_size, D)
    )
