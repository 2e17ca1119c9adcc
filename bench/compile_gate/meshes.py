"""Whole steps of Llama-3.1-8B compiled for four and eight GPUs. What they exchange is held to a committed list; their
HLO must not copy weights or the cache. Weights along `fsdp` must come, and tokens in a ring go round, while a device
computes."""

from collections.abc import Iterator
from typing import Any

import jax

from atoma_jax.engine.buckets import Program
from atoma_jax.ops import Backend
from atoma_jax.ops.residual import CUT_TOKENS
from bench.collectives import Collective, collectives, differences, listed
from bench.compile_gate import aot, table
from bench.compile_gate.cases import Target
from bench.compile_gate.steps import hlo_problems, may_dequantize
from bench.mesh_steps import MeshModel, StepShape, abstract_state, device_part, lowered_step, mesh_model
from bench.real_models import LLAMA_8B
from sharding.mesh import parse_mesh

MESHES = ("tensor=4", "fsdp=4", "fsdp=2,tensor=2", "tensor=8", "fsdp=8", "fsdp=2,tensor=4")
DECODE, MIXED = Program("decode", 8, 8), Program("mixed", CUT_TOKENS, 8)
ROUND = Program("mixed", 2048, 8)  # over tensor=4, of so many tokens that they go round
Case = tuple[str, str, Program]  # mesh, type of weights, what each slice computes
QUICK: tuple[Case, ...] = (("fsdp=2,tensor=2", "bf16", DECODE), ("tensor=8", "Q4_K", DECODE))
CASES: tuple[Case, ...] = (
    *QUICK,
    *(case for mesh in MESHES for program in (DECODE, MIXED) if (case := (mesh, "bf16", program)) not in QUICK),
    ("fsdp=8", "Q4_K", DECODE),
    ("fsdp=2,tensor=2", "Q4_K", DECODE),
    ("tensor=4", "bf16", ROUND),
    ("tensor=4", "Q4_K", ROUND),
)
PAGES, TABLE_WIDTH = 512, 64  # of each slice


def check(case: Case, target: Target, *, write: bool) -> list[str]:
    """What is wrong with one step.

    Args:
        case: of `CASES`.
        target: which GPUs.
        write: keep what is found in the list, instead of comparing with it.
    """
    mesh, type_name, program = case
    shape, name = parse_mesh(mesh), f"{mesh}, {type_name}, {program}"
    backend = Backend(platform="cuda", operands="bfloat16", weight_layout="planar", kernels="pallas")
    model = mesh_model(LLAMA_8B, type_name, backend, shape, aot.devices(target, shape.num_devices))
    sizes = StepShape(program=program, num_pages=PAGES, table_width=TABLE_WIDTH)
    compiled = aot.compiled_lowered(lowered_step(model, sizes))
    hlo = compiled.as_text() or ""
    found = collectives(hlo, shape)
    memory: Any = compiled.memory_analysis()
    row = {"argument_bytes": memory.argument_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes}
    row |= {"collectives": listed(found)}
    known = table.read_steps()
    problems = list(
        _problems(hlo, model, sizes, found, packed=type_name != "bf16", by_kernels=may_dequantize(type_name, program))
    )
    if write:
        table.write_step(jax.__version__, name, row)
    elif name not in known["cases"]:
        problems.append(f"is not in {table.STEPS.name}: run with --write")
    elif known["jax"] == jax.__version__:  # another XLA may send other arrays together, or none for what is constant
        problems += differences(row["collectives"], known["cases"][name]["collectives"])
    return [f"{name} on {target}: {problem}" for problem in problems]


def _problems(
    hlo: str, model: MeshModel, sizes: StepShape, found: list[Collective], *, packed: bool, by_kernels: bool
) -> Iterator[str]:
    """Of the step on one device."""
    state, weights = device_part(abstract_state(model, sizes)), device_part(model.weights)
    yield from hlo_problems(
        hlo, model.part, state, weights, packed=packed, by_kernels=by_kernels, gathers=model.backend.gathers
    )
    for one in found:
        is_weights = one.axes == ("fsdp",) and one.kind == "all-gather" and one.times >= model.part.num_layers
        if is_weights and not one.asynchronous:
            yield f"waits for {', '.join(map(str, one.pieces))} of the next layer, along fsdp"
    hops = [one for one in found if one.kind == "collective-permute" and one.times >= model.part.num_layers]
    waits = [", ".join(map(str, one.pieces)) for one in hops if not one.asynchronous]
    if len(waits) > 1:  # the first hop of a net may have nothing beside it
        yield f"waits for hops of a ring: {'; '.join(waits)}"
