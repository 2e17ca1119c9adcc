"""Compiles the programs of an engine and runs them: owns weights, device state and the host's slot tables.

One jitted call a step. A call returns before the device is done; its tokens start for the host at once and are read a
step later.
"""

import itertools
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from atoma_jax.engine.batch import SlotTables, batch_size, pack
from atoma_jax.engine.buckets import Buckets, Program
from atoma_jax.engine.cluster import Cluster, Order
from atoma_jax.engine.compilations import COMPILATIONS
from atoma_jax.engine.compile_options import compile_options
from atoma_jax.engine.mesh_step import MeshStep
from atoma_jax.engine.plan import SlicedPlan, StepPlan
from atoma_jax.engine.sampler_state import SamplerShape, SlotRow, SlotRules, empty_row, write_allowed, write_slot
from atoma_jax.engine.step import EngineState, StepOutput, StepSizes, Weights, make_state, run_step
from atoma_jax.model_spec import KVDtype, ModelSpec
from atoma_jax.ops import Backend
from sharding.plan import allocated_bytes

_LOOK = 1.0  # seconds between looks at other processes while programs compile
Run = Callable[[Callable[[], Any]], Any]  # does what may wait for devices


@dataclass(frozen=True, slots=True)
class HostOutput:
    """A step's results on the host, one row for each of `StepPlan.sampling`, or for each position that is scored."""

    tokens: np.ndarray
    ok: np.ndarray
    logprob: np.ndarray | None  # None where no row asked for logprobs, as the three below
    rank: np.ndarray | None
    top_ids: np.ndarray | None
    top_logprobs: np.ndarray | None
    pooled: np.ndarray | None = None  # f32 [Q, D], of an engine that pools


class PendingOutput:
    """The results of a step that is under way: of one program, or of two that make up a split step."""

    def __init__(
        self,
        outputs: list[StepOutput],
        rows: list[tuple[int, np.ndarray]],
        wants_logprobs: bool,
        run: Run,
        *,
        positions: int = 0,
    ):
        """`rows` are those that count, in order: which output they are in, and where. `run` does what may wait.
        `positions` are computed, padding among them."""
        self.positions = positions
        self._rows, self._run, self._pools = rows, run, any(out.pooled is not None for out in outputs)
        self._parts = [
            [out.tokens_ok, *((out.logprob, out.rank, out.top_ids, out.top_logprobs) if wants_logprobs else ())]
            if out.pooled is None
            else [out.tokens_ok, out.pooled]
            for out in outputs
        ]
        for part in itertools.chain.from_iterable(self._parts):
            part.copy_to_host_async()

    def read(self) -> HostOutput:
        """Waits for the step; raises what the device raised."""
        return self._run(self._read)

    def _read(self) -> HostOutput:
        arrived = [[np.asarray(array) for array in part] for part in self._parts]
        tokens, ok = np.concatenate([arrived[at][0][:, rows] for at, rows in self._rows], axis=1)
        extra = [
            np.concatenate([arrived[at][number][rows] for at, rows in self._rows])
            for number in range(1, len(arrived[0]))
        ]
        if self._pools:
            return HostOutput(tokens, ok.astype(np.bool_), None, None, None, None, pooled=extra[0])
        return HostOutput(tokens, ok.astype(np.bool_), *(extra or [None] * 4))


class Runner:
    """The device of one engine, or its devices."""

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
        mesh: MeshStep | None = None,
        guided: bool = False,
        cluster: Cluster | None = None,
    ):
        """The model is given as its `nnx.GraphDef`; slots and pages are those of a slice, of which a mesh has
        several. `split_prefill`: decodes and prefills of one plan run as two
        programs, so that a row's arithmetic does not depend on what else the step holds. `guided`: `allow` will be
        called. `cluster`: the processes that a mesh spans; the first one's runner tells the others', which `follow`."""
        self.buckets = buckets
        self._graph, self._sizes, self._split_prefill = graph, sizes, split_prefill
        self._mesh, slices = mesh, 1 if mesh is None else mesh.shape.num_slices
        self._cluster, self._run = cluster, _here if cluster is None else cluster.run
        self._new_state = partial(
            make_state,
            spec,
            replace(sampler, slots=slices * sampler.slots),
            backend,
            num_pages=slices * num_pages,
            page_size=sizes.page_size,
            kv_dtype=kv_dtype,
        )
        self._slots = sampler.slots
        self._options = compile_options(backend.platform)
        self._tables = [SlotTables.empty(sampler.slots, sizes.table_width) for _ in range(slices)]
        self._write_slot_shape = (jax.ShapeDtypeStruct((), jnp.int32), empty_row(sampler))
        self._programs: dict[Program, Future[Any]] = {}
        self._write_slot: Future[Any] | None = None
        self._sampler_bytes = 0
        self._allowed_rows = (1, sampler.slots) if guided and sampler.slots > 1 else (1,) if guided else ()
        self._mask_words = sampler.mask_words
        self._write_allowed: dict[int, Future[Any]] = {}  # by rows
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
        state, mesh = jax.eval_shape(self._new_state), self._mesh
        if mesh is not None:
            state = mesh.abstract_state(state)
        self._sampler_bytes = sum(_device_part(leaf) for leaf in jax.tree.leaves(state.sampler))

        def compiled(function: Any, donated: int, *shapes: Any) -> Any:
            return jax.jit(function, donate_argnums=donated).lower(*shapes).compile(self._options)

        pool = ThreadPoolExecutor(threads, "compile", initializer=COMPILATIONS.plan_this_thread)

        def build(program: Program) -> Any:
            count = batch_size(program, self._sizes.table_width)
            words = jax.ShapeDtypeStruct((count,), jnp.int32) if mesh is None else mesh.abstract_words(count)
            step = partial(run_step, graph=self._graph, program=program, sizes=self._sizes)
            if mesh is not None:
                step = mesh.step(step, weights, state)
            return compiled(step, 1, weights, state, words)

        def build_write() -> Any:
            if mesh is None:
                return compiled(write_slot, 0, state.sampler, *self._write_slot_shape)
            _, row = self._write_slot_shape
            write, number = mesh.slot_writer(state.sampler, row), mesh.abstract_number()
            row = mesh.abstract_row(row, state.sampler)
            return compiled(write, 0, state.sampler, number, number, row)

        def build_allowed(rows: int) -> Any:
            slots, bits = (rows,), (rows, self._mask_words)
            if mesh is None:
                shapes = jax.ShapeDtypeStruct(slots, jnp.int32), jax.ShapeDtypeStruct(bits, jnp.int32)
                return compiled(write_allowed, 0, state.sampler, *shapes)
            write, shapes = mesh.allowed_writer(state.sampler), mesh.abstract_allowed(*bits)
            return compiled(write, 0, state.sampler, *shapes)

        self._programs = {program: pool.submit(build, program) for program in self.buckets.programs}
        self._write_slot = pool.submit(build_write)
        self._write_allowed = {rows: pool.submit(build_allowed, rows) for rows in self._allowed_rows}
        return pool

    def start(self, weights: Weights) -> None:
        """Takes the loaded weights, makes the state, and waits for every program. Nothing compiles afterwards."""
        self._weights = weights
        self._state = self._new_state() if self._mesh is None else self._mesh.new_state(self._new_state)
        for future in (*self._programs.values(), self._write_slot, *self._write_allowed.values()):
            assert future is not None
            self._wait_for(future)

    def _wait_for(self, future: Future[Any]) -> Any:
        """A compiled program. Raises EngineDeadError if another process is lost meanwhile."""
        while self._cluster is not None and not future.done():
            self._cluster.check()
            wait([future], timeout=_LOOK)
        return future.result()

    def warm_up(self) -> None:
        """Runs the smallest program once with no work, so that the first request does not pay for lazy set-up."""
        program = self.buckets.smallest
        words = np.zeros(len(self._tables) * batch_size(program, self._sizes.table_width), np.int32)

        def run() -> None:
            self._execute(program, words)
            jax.block_until_ready(self._state)

        self._run(run)

    def follow(self) -> None:
        """Does what process 0's runner does, until that one ends.

        Raises:
            EngineDeadError: a process is lost.
        """
        cluster = self._cluster
        assert cluster is not None
        while (frame := cluster.next()) is not None:
            if frame.kind == Order.STEP:
                program = self.buckets.programs[frame.index]
                words = np.frombuffer(frame.payload, np.int32)
                cluster.run(partial(self._execute, program, words))
            elif frame.kind == Order.ALLOWED:
                count = len(self._tables) * frame.index
                numbers = np.frombuffer(frame.payload, np.int32)
                bits = numbers[count:].reshape(count, self._mask_words)
                cluster.run(partial(self._write_bits, frame.index, numbers[:count], bits))
            else:
                assert frame.kind == Order.SLOT, frame.kind
                row = _row_of(frame.payload, self._write_slot_shape[1])
                cluster.run(partial(self._write, *divmod(frame.index, self._slots), row))

    def check(self) -> None:
        """Raises EngineDeadError if a process that a step needs is lost."""
        if self._cluster is not None:
            self._cluster.check()

    def when_lost(self, call: Callable[[], None]) -> None:
        """Has `call` called, from another thread, once such a process is lost."""
        if self._cluster is not None:
            self._cluster.when_lost(call)

    def device_bytes(self, part: Literal["weights", "pages"]) -> int:
        """Bytes that weights or the KV cache hold on the device that has most of them."""
        assert self._state is not None
        return max(allocated_bytes(self._weights if part == "weights" else self._state.pages).values())

    def workspace_bytes(self) -> int:
        """Bytes that a device needs beside weights and pages: of the program that needs most, for temporaries and
        results, and of the sampler's state. Waits until everything is compiled."""
        needs = [_needs_of(self._wait_for(future)) for future in self._programs.values()]
        return max(needs) + self._sampler_bytes

    def close(self) -> None:
        """Gives the device's memory back; the runner is of no use afterwards."""
        self._weights = self._state = None
        self._programs.clear()
        if self._cluster is not None:
            self._cluster.close()

    def take_slot(
        self,
        slot: int,
        settings: np.ndarray,
        rules: SlotRules | None,
        prompt: list[int],
        outputs: list[int],
        home: int = 0,
    ) -> None:
        """A sequence begins in a slot, for the first time or after preemption.

        Args:
            slot: its slot.
            settings: `sampling_rows.encode`'s row for it.
            rules: of requests whose flags say `needs_slot_row`; None for the others.
            prompt: its prompt.
            outputs: tokens it has yielded already.
            home: the slice that it runs in.
        """
        self._tables[home].take(slot, settings)
        if rules is not None:
            row = rules.slot_row(prompt, outputs)
            if self._cluster is not None:
                self._cluster.tell(Order.SLOT, home * self._slots + slot, map(np.ndarray.tobytes, jax.tree.leaves(row)))
            self._run(partial(self._write, home, slot, row))

    def allow(self, rows: list[tuple[int, int]], bits: Int32[np.ndarray, "B M"]) -> None:
        """Says which tokens the next step may draw in some slots whose settings have the flag MASK.

        Args:
            rows: slice and slot of each.
            bits: theirs, bit i of word w for token 32·w + i.
        """
        places = [[at for at, (home, _) in enumerate(rows) if home == own] for own in range(len(self._tables))]
        most = max(map(len, places))
        size = next(size for size in self._allowed_rows if size >= most)
        nowhere = len(self._tables[0].filled)  # past the last slot: dropped
        slots = np.full((len(places), size), nowhere, np.int32)
        words = np.zeros((len(places), size, self._mask_words), np.int32)
        for home, own in enumerate(places):
            slots[home, : len(own)] = [rows[at][1] for at in own]
            words[home, : len(own)] = bits[own]
        if self._cluster is not None:
            self._cluster.tell(Order.ALLOWED, size, [slots.tobytes(), words.tobytes()])
        self._run(partial(self._write_bits, size, slots.reshape(-1), words.reshape(-1, self._mask_words)))

    def launch(self, plan: StepPlan | SlicedPlan) -> PendingOutput:
        """Dispatches a step. Its results are read later, while the next one runs."""
        calls = _calls(plan.slices, split_prefill=self._split_prefill)
        programs = [self.buckets.choose_for(call) for call in calls]
        outputs = [self._call(call, program) for call, program in zip(calls, programs, strict=True)]
        rows = [
            (at, home * program.logit_rows + _yielding_rows(call[home]))
            for home in range(len(self._tables))
            for at, (call, program) in enumerate(zip(calls, programs, strict=True))
        ]
        wants = any(
            part.is_scoring or any(work.samples and work.seq.params.logprobs is not None for work in part.works)
            for part in plan.slices
        )
        positions = len(self._tables) * sum(program.tokens for program in programs)
        return PendingOutput(outputs, rows, wants, self._run, positions=positions)

    def _call(self, plans: tuple[StepPlan, ...], program: Program) -> StepOutput:
        parts = [pack(plan, program, tables) for plan, tables in zip(plans, self._tables, strict=True)]
        words = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self._cluster is not None:
            self._cluster.tell(Order.STEP, self.buckets.programs.index(program), [words.tobytes()])
        return self._run(partial(self._execute, program, words))

    def _execute(self, program: Program, words: np.ndarray) -> StepOutput:
        placed = words if self._mesh is None else self._mesh.words_on_devices(words)
        self._state, output = self._programs[program].result()(self._weights, self._state, placed)
        return output

    def _write(self, home: int, slot: int, row: SlotRow) -> None:
        assert self._state is not None
        assert self._write_slot is not None
        write, sampler, mesh = self._write_slot.result(), self._state.sampler, self._mesh
        if mesh is None:
            sampler = write(sampler, np.int32(slot), row)
        else:
            where = [mesh.number_on_devices(number) for number in (home, slot)]
            sampler = write(sampler, *where, mesh.row_on_devices(row, sampler))
        self._state = EngineState(pages=self._state.pages, sampler=sampler)

    def _write_bits(self, size: int, slots: np.ndarray, bits: np.ndarray) -> None:
        assert self._state is not None
        places = (slots, bits) if self._mesh is None else self._mesh.allowed_on_devices(slots, bits)
        sampler = self._write_allowed[size].result()(self._state.sampler, *places)
        self._state = EngineState(pages=self._state.pages, sampler=sampler)


def _here(call: Callable[[], Any]) -> Any:
    return call()


def _device_part(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array that one device holds."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _needs_of(compiled: Any) -> int:
    """Bytes that a program takes while it runs and that are not its arguments."""
    found = compiled.memory_analysis()
    if found is None:  # a backend that does not say
        return 0
    return found.temp_size_in_bytes + max(0, found.output_size_in_bytes - found.alias_size_in_bytes)


def _row_of(payload: bytes, like: SlotRow) -> SlotRow:
    """A slot's row from the bytes of its arrays, behind each other."""
    leaves, tree = jax.tree.flatten(like)
    sizes = [leaf.nbytes for leaf in leaves]
    ends = itertools.accumulate(sizes)
    arrays = [
        np.frombuffer(payload[end - size : end], leaf.dtype).reshape(leaf.shape)
        for leaf, size, end in zip(leaves, sizes, ends, strict=True)
    ]
    return jax.tree.unflatten(tree, arrays)


def _calls(plans: tuple[StepPlan, ...], *, split_prefill: bool) -> list[tuple[StepPlan, ...]]:
    """What the slices of a step run, program by program: slices take part in each, those without work in it idly."""
    scores = tuple(plan if plan.is_scoring else StepPlan((), ()) for plan in plans)
    others = tuple(StepPlan((), ()) if plan.is_scoring else plan for plan in plans)
    calls = [scores, others]
    if split_prefill and any(plan.decodes for plan in others) and any(plan.prefills for plan in others):
        decodes = tuple(StepPlan(plan.decodes, ()) for plan in others)
        calls = [scores, decodes, tuple(StepPlan((), plan.prefills) for plan in others)]
    return [call for call in calls if any(plan.works for plan in call)]


def _yielding_rows(plan: StepPlan) -> np.ndarray:
    """Rows of logits that belong to `StepPlan.sampling`, or to the positions that are scored."""
    if plan.is_scoring:
        return np.arange(plan.num_tokens)
    return np.asarray([row for row, work in enumerate(plan.works) if work.samples], np.intp)
