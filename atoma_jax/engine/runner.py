"""Compiles the programs of an engine and runs them: owns weights, device state and the host's slot tables.

One jitted call a step. A call returns before the device is done; its tokens start for the host at once and are read a
step later.
"""

import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atoma_jax.engine.batch import SlotTables, batch_size, pack
from atoma_jax.engine.buckets import Buckets, Program
from atoma_jax.engine.plan import StepPlan
from atoma_jax.engine.sampler_state import SamplerShape, SlotRules, empty_row, write_slot
from atoma_jax.engine.step import EngineState, StepOutput, StepSizes, Weights, make_state, run_step
from atoma_jax.model_spec import KVDtype, ModelSpec
from atoma_jax.ops import Backend


@dataclass(frozen=True, slots=True)
class HostOutput:
    """A step's results on the host, one row for each of `StepPlan.sampling`, or for each position that is scored."""

    tokens: np.ndarray
    ok: np.ndarray
    logprob: np.ndarray | None  # None where no row asked for logprobs, as the three below
    rank: np.ndarray | None
    top_ids: np.ndarray | None
    top_logprobs: np.ndarray | None


class PendingOutput:
    """The results of a step that is under way: of one program, or of two that make up a split step."""

    def __init__(self, outputs: list[StepOutput], rows: list[np.ndarray], wants_logprobs: bool):
        """`rows` are those of each output's rows that count, in order."""
        self._rows = rows
        self._parts = [
            [out.tokens_ok, *((out.logprob, out.rank, out.top_ids, out.top_logprobs) if wants_logprobs else ())]
            for out in outputs
        ]
        for part in itertools.chain.from_iterable(self._parts):
            part.copy_to_host_async()

    def read(self) -> HostOutput:
        """Waits for the step; raises what the device raised."""
        tokens_ok = [np.asarray(part[0])[:, rows] for part, rows in zip(self._parts, self._rows, strict=True)]
        tokens, ok = np.concatenate(tokens_ok, axis=1)
        extra = [
            np.concatenate([np.asarray(array)[rows] for array, rows in zip(arrays, self._rows, strict=True)])
            for arrays in list(zip(*self._parts, strict=True))[1:]
        ]
        return HostOutput(tokens, ok.astype(np.bool_), *(extra or [None] * 4))


class Runner:
    """The device of one engine."""

    def __init__(
        self,
        graph: Any,
        spec: ModelSpec,
        sampler: SamplerShape,
        backend: Backend,
        buckets: Buckets,
        sizes: StepSizes,
        *,
        num_pages: int,
        kv_dtype: KVDtype,
        split_prefill: bool,
    ):
        """The model is given as its `nnx.GraphDef`. `split_prefill`: decodes and prefills of one plan run as two
        programs, so that a row's arithmetic does not depend on what else the step holds."""
        self.buckets = buckets
        self._graph, self._sizes, self._split_prefill = graph, sizes, split_prefill
        self._new_state = partial(
            make_state, spec, sampler, backend, num_pages=num_pages, page_size=sizes.page_size, kv_dtype=kv_dtype
        )
        self._tables = SlotTables.empty(sampler.slots, sizes.table_width)
        self._write_slot_shape = (jax.ShapeDtypeStruct((), jnp.int32), empty_row(sampler))
        self._programs: dict[Program, Future[Any]] = {}
        self._write_slot: Future[Any] | None = None
        self._weights: Weights | None = None
        self._state: EngineState | None = None

    def compile(self, weights: Weights, *, threads: int) -> ThreadPoolExecutor:
        """Starts to compile every program from abstract shapes.

        Args:
            weights: the model's state with `ShapeDtypeStruct`s as leaves.
            threads: programs compiled at once.

        Returns:
            The pool, for the caller to shut down; `start` waits for the programs.
        """
        state = jax.eval_shape(self._new_state)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="compile")

        def build(program: Program) -> Any:
            words = jax.ShapeDtypeStruct((batch_size(program, self._sizes.table_width),), jnp.int32)
            step = partial(run_step, graph=self._graph, program=program, sizes=self._sizes)
            return jax.jit(step, donate_argnums=1).lower(weights, state, words).compile()

        def build_write() -> Any:
            return jax.jit(write_slot, donate_argnums=0).lower(state.sampler, *self._write_slot_shape).compile()

        self._programs = {program: pool.submit(build, program) for program in self.buckets.programs}
        self._write_slot = pool.submit(build_write)
        return pool

    def start(self, weights: Weights) -> None:
        """Takes the loaded weights, makes the state, and waits for every program. Nothing compiles afterwards."""
        self._weights = weights
        self._state = self._new_state()
        for future in (*self._programs.values(), self._write_slot):
            assert future is not None
            future.result()

    def warm_up(self) -> None:
        """Runs the smallest program once with no work, so that the first request does not pay for lazy set-up."""
        program = self.buckets.decode[0]
        words = np.zeros(batch_size(program, self._sizes.table_width), np.int32)
        self._state, _ = self._programs[program].result()(self._weights, self._state, words)
        jax.block_until_ready(self._state)

    def close(self) -> None:
        """Gives the device's memory back; the runner is of no use afterwards."""
        self._weights = self._state = None
        self._programs.clear()

    def take_slot(
        self, slot: int, settings: np.ndarray, rules: SlotRules | None, prompt: list[int], outputs: list[int]
    ) -> None:
        """A sequence begins in a slot, for the first time or after preemption.

        Args:
            slot: its slot.
            settings: `sampling_rows.encode`'s row for it.
            rules: of requests whose flags say `needs_slot_row`; None for the others.
            prompt: its prompt.
            outputs: tokens it has yielded already.
        """
        self._tables.take(slot, settings)
        if rules is not None:
            assert self._state is not None
            assert self._write_slot is not None
            write = self._write_slot.result()
            sampler = write(self._state.sampler, np.int32(slot), rules.slot_row(prompt, outputs))
            self._state = EngineState(pages=self._state.pages, sampler=sampler)

    def launch(self, plan: StepPlan) -> PendingOutput:
        """Dispatches a step. Its results are read later, while the next one runs."""
        parts = [plan]
        if self._split_prefill and plan.decodes and plan.prefills:
            parts = [StepPlan(plan.decodes, ()), StepPlan((), plan.prefills)]
        outputs = [self._call(part) for part in parts]
        wants = plan.is_scoring or any(work.samples and work.seq.params.logprobs is not None for work in plan.works)
        return PendingOutput(outputs, [_yielding_rows(part) for part in parts], wants)

    def _call(self, plan: StepPlan) -> StepOutput:
        program = self.buckets.choose(plan)
        words = pack(plan, program, self._tables)
        self._state, output = self._programs[program].result()(self._weights, self._state, words)
        return output


def _yielding_rows(plan: StepPlan) -> np.ndarray:
    """Rows of logits that belong to `StepPlan.sampling`, or to the positions that are scored."""
    if plan.is_scoring:
        return np.arange(plan.num_tokens)
    return np.asarray([row for row, work in enumerate(plan.works) if work.samples], np.intp)
