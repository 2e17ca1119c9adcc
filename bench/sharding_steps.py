"""Steps over meshes of simulated devices: compiled at real shapes without allocating anything, run at small ones."""

import sys
import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from atoma_jax.engine.batch import unpack
from atoma_jax.engine.buckets import Program
from atoma_jax.engine.mesh_step import MeshStep
from atoma_jax.engine.sampling_rows import Column, RowFlag
from atoma_jax.ops import Backend
from bench.collectives import collectives, listed
from bench.mesh_steps import (
    PAGE_SIZE,
    MeshModel,
    StepShape,
    abstract_state,
    device_bytes,
    lowered_step,
    mesh_model,
    new_state,
)
from bench.real_models import LLAMA_1B, LLAMA_8B, TINY, random_value
from bench.step_model import Exchange
from sharding.mesh import parse_mesh

MESHES = ("data=1", "tensor=2", "tensor=4", "tensor=8", "fsdp=2", "fsdp=4", "fsdp=8", "fsdp=2,tensor=2", "data=2")
MODELS = {"Llama-3.1-8B": LLAMA_8B, "Llama-3.2-1B": LLAMA_1B}
SMALL = replace(TINY, dim=512, num_layers=4, num_heads=8, num_kv_heads=8, ffn_dim=2048, vocab_size=8192)
# Of each slice: two whose residual stream is whole, two that cut it over `tensor`, two whose tokens go round it.
PROGRAMS = (
    Program("decode", 8, 8),
    *(Program("mixed", tokens, 8) for tokens in (512, 1024, 1536, 16384, 32768)),
)
TABLE_WIDTH = 64  # pages of a sequence
ROWS, CONTEXT = 16, 128  # that the small model decodes, in all slices together
WARM, STEPS = 3, 40


def compiled(name: str) -> dict[str, Any]:
    """By mesh: bytes of a device, and by program its temporaries and what it exchanges."""
    backend = Backend(platform="cuda", operands="bfloat16", weight_layout="planar", kernels="xla")
    found: dict[str, Any] = {}
    for mesh in MESHES:
        model = mesh_model(MODELS[name], "bf16", backend, parse_mesh(mesh), jax.devices())
        shapes = [StepShape(program=one, num_pages=512, table_width=TABLE_WIDTH) for one in PROGRAMS]
        pages = abstract_state(model, shapes[0]).pages
        found[mesh] = {
            "weight_bytes": device_bytes(model.weights),
            "kv_bytes_per_token": device_bytes(pages) / (shapes[0].num_pages * PAGE_SIZE),
            "programs": {str(shape.program): _compiled(model, shape) for shape in shapes},
        }
        print(f"{name}, {mesh}: {found[mesh]['weight_bytes'] / 1e9:.2f} GB of weights", file=sys.stderr, flush=True)
    return found


def _compiled(model: MeshModel, shape: StepShape) -> dict[str, Any]:
    quickly: Any = {"xla_backend_optimization_level": 0}  # LLVM has no part in what is read here
    program = lowered_step(model, shape).compile(quickly)
    exchanged = collectives(program.as_text() or "", model.mesh)
    memory: Any = program.memory_analysis()
    return {
        "temporary_bytes": memory.temp_size_in_bytes,
        "exchange": asdict(Exchange.of(exchanged, model.part.num_layers)),
        "collectives": listed(exchanged),
    }


def run() -> dict[str, Any]:
    """Seconds of a decode step of the small model in float32, by mesh: of many the least, in turns."""
    steps = {mesh: _Running(mesh) for mesh in MESHES}
    seconds = {mesh: [step.timed() for _ in range(WARM)] for mesh, step in steps.items()}
    for _ in range(STEPS):
        for mesh, step in steps.items():
            seconds[mesh].append(step.timed())
    return {"rows": ROWS, "steps": STEPS, "seconds": {mesh: min(times[WARM:]) for mesh, times in seconds.items()}}


class _Running:
    """The small model on one mesh, as many sequences of `CONTEXT` tokens on all its slices together as on any other."""

    def __init__(self, mesh: str):
        shape = parse_mesh(mesh)
        rows = ROWS // shape.num_slices
        sizes = StepShape(
            program=Program("decode", rows, rows),
            num_pages=1 + rows * CONTEXT // PAGE_SIZE,
            table_width=CONTEXT // PAGE_SIZE,
            kv_dtype="float32",
        )
        backend = Backend(platform="cpu", operands="float32", weight_layout="rows", kernels="xla")
        model = mesh_model(SMALL, "bf16", backend, shape, jax.devices())
        self._step = lowered_step(model, sizes).compile()
        self._weights = jax.tree.map(lambda leaf: jax.device_put(random_value(leaf), leaf.sharding), model.weights)
        devices = MeshStep(model.cutting, model.devices)
        self._state = devices.new_state(partial(new_state, model, sizes))
        self._words = devices.words_on_devices(np.tile(_decode(sizes), shape.num_slices))

    def timed(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self._state, output = self._step(self._weights, self._state, self._words)
        jax.block_until_ready(output)
        return time.perf_counter() - began


def _decode(sizes: StepShape) -> np.ndarray:
    """A slice's batch: every row decodes the last token of its context, greedily."""
    words = np.zeros(sizes.words, np.int32)
    batch, rows = unpack(words, sizes.program, sizes.table_width), sizes.program.rows
    batch.num_tokens[0] = rows
    batch.row[:] = batch.logit_token[:] = np.arange(rows)
    batch.tokens[:] = np.arange(rows) + 3
    batch.position[:], batch.decode_length[:] = CONTEXT - 1, CONTEXT
    batch.page_table[:] = 1 + np.arange(rows * sizes.table_width).reshape(rows, sizes.table_width)
    batch.sampling[:, Column.SLOT], batch.sampling[:, Column.FLAGS] = np.arange(rows), RowFlag.SAMPLE
    return words
