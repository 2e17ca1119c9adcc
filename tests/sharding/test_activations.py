"""Activations of a large step are cut over every axis that cuts it, read from what XLA compiled."""

import re
from dataclasses import replace
from typing import Any

import jax
import pytest

from atoma_jax.engine.buckets import Program
from atoma_jax.model_spec import ModelSpec
from atoma_jax.ops import Backend
from atoma_jax.ops.residual import CUT_TOKENS
from bench.mesh_steps import StepShape, lowered_step, mesh_model
from bench.real_models import LLAMA_1B
from sharding.mesh import parse_mesh

NARROW = replace(LLAMA_1B, dim=512, num_layers=3, num_heads=8, num_kv_heads=4, ffn_dim=1024, vocab_size=512)
TOKENS = 8 * CUT_TOKENS  # of all slices together
# A CPU has no arithmetic in bfloat16, and would keep a copy in float32 of what it multiplies. LLVM has no part in this.
OPTIONS: Any = {"xla_disable_hlo_passes": "float-normalization-bf16", "xla_backend_optimization_level": 0}
MESHES = ("tensor=8", "fsdp=8", "fsdp=2,tensor=4")


def compiled(spec: ModelSpec, mesh: str, tokens: int) -> jax.stages.Compiled:
    """A step of so many tokens in all slices, weights and cache in bfloat16, without any of them."""
    shape = parse_mesh(mesh)
    backend = Backend(platform="cuda", operands="bfloat16", weight_layout="planar", kernels="xla")
    model = mesh_model(spec, "bf16", backend, shape, jax.devices())
    program = Program("mixed", tokens // shape.num_slices, 8)
    return lowered_step(model, StepShape(program=program, num_pages=64, table_width=64)).compile(OPTIONS)


def carried(step: jax.stages.Compiled) -> set[str]:
    """Types of the arrays that loops hand from one turn to the next, layers' among them."""
    loops = re.findall(r"= \((.*?)\) while\(", step.as_text() or "")
    return set(re.findall(r"\w+\[[\d,]*\]", " ".join(loops)))


@pytest.mark.parametrize(
    "mesh", [mesh if mesh == MESHES[-1] else pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES]
)
def test_the_stream_between_layers_is_a_devices_share(mesh: str) -> None:
    tokens = TOKENS // parse_mesh(mesh).num_slices
    held = carried(compiled(NARROW, mesh, TOKENS))
    assert f"f32[{TOKENS // 8},{NARROW.dim}]" in held
    assert tokens == TOKENS // 8 or f"f32[{tokens},{NARROW.dim}]" not in held


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_activations_are_a_devices_share(mesh: str) -> None:
    """Of a step whose tokens go round: nothing that a device needs for its products is whole, not for a moment. Along
    `fsdp` two layers of weights are, which are no activations."""

    def temporaries(mesh: str) -> int:
        return compiled(LLAMA_1B, mesh, 16384).memory_analysis().temp_size_in_bytes  # pyright: ignore[reportOptionalMemberAccess]

    shape, gathered = parse_mesh(mesh), 0
    if shape.fsdp > 1:
        D, H, F = LLAMA_1B.dim, LLAMA_1B.head_dim, LLAMA_1B.ffn_dim
        layer = D * (H * (2 * LLAMA_1B.num_heads + 2 * LLAMA_1B.num_kv_heads) + 3 * F)
        gathered = 2 * layer * 2 // shape.tensor  # two bytes each
    assert 0 < temporaries(mesh) - gathered < 1.05 * temporaries("data=1") / 8
