"""Whole steps of Llama-3.1-8B compiled for a GPU; their HLO must neither copy weights or the KV cache nor hold a weight
dequantized, but for what kernels write for many rows. Those of several devices are `meshes.py`'s.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from atoma_jax import ops
from atoma_jax.engine.batch import batch_size
from atoma_jax.engine.buckets import Program
from atoma_jax.engine.sampler_state import SamplerShape
from atoma_jax.engine.step import StepSizes, make_state, run_step
from atoma_jax.model_spec import ModelSpec
from atoma_jax.ops import Backend
from bench.compile_gate import aot
from bench.compile_gate.cases import Target
from bench.real_models import LLAMA_8B, abstract_values, graph_and_state, with_type

PROGRAMS = (Program("decode", 1, 1), Program("decode", 8, 8), Program("mixed", 512, 8))
QUICK = ("Q4_K", PROGRAMS[0])
LAUNCHES = {"bf16": 12, "Q4_K": 12, "ternary": 14}  # of a layer that decodes: with few rows they take most of the time
TYPES = ("bf16", "Q4_K", "ternary")
LAYERS = 4  # of 32: they are one loop
_LARGE = 1 << 18  # elements of a layer's share from which on a stack is not to be copied from
_COPIES = ("copy", "copy-start", "transpose", "convert")
_NO_LAUNCH = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")
_SHORT = {"uint16": "u16", "bfloat16": "bf16", "float16": "f16", "float32": "f32", "int8": "s8"}
PAGES, PAGE_SIZE, TABLE_WIDTH = 512, 16, 64


def check_step(type_name: str, program: Program, target: Target) -> tuple[int, list[str]]:
    """Launches of a layer, and what is wrong with the HLO of one step."""
    spec = replace(with_type(LLAMA_8B, type_name), num_layers=LAYERS)
    backend = Backend(platform="cuda", operands="bfloat16", weight_layout="planar", kernels="pallas")
    graph, weights = graph_and_state(spec, backend, abstract_values(spec, type_name, backend))
    sampler = SamplerShape(slots=8, vocab_size=spec.vocab_size, max_model_len=TABLE_WIDTH * PAGE_SIZE)
    state = jax.eval_shape(
        partial(make_state, spec, sampler, backend, num_pages=PAGES, page_size=PAGE_SIZE, kv_dtype="bfloat16")
    )
    sizes = StepSizes(table_width=TABLE_WIDTH, page_size=PAGE_SIZE, max_logprobs=20, fixed_parts=False)
    words = jax.ShapeDtypeStruct((batch_size(program, TABLE_WIDTH),), jnp.int32)
    step = partial(run_step, graph=graph, program=program, sizes=sizes)
    compiled = aot.compiled(step, (weights, state, words), target, donate_argnums=1)
    packed = type_name != "bf16"
    by_kernels = may_dequantize(type_name, program)
    hlo = compiled.as_text() or ""
    problems = list(hlo_problems(hlo, spec, state, weights, packed=packed, by_kernels=by_kernels))
    launches, most = launches_of_a_layer(hlo), LAUNCHES[type_name]
    if program.kind == "decode" and not 0 < launches <= most:
        problems.append(f"a layer has {launches} launches, {most} at most")
    return launches, [f"{type_name}, {program} on {target}: {problem}" for problem in problems]


def launches_of_a_layer(hlo: str) -> int:
    """What the body of the loop over layers runs, one after the other; 0: no body of a loop has kernels of ours."""
    bodies = set(re.findall(r"body=%([\w.-]+)", hlo))
    launches = 0
    for name, lines in _computations(hlo):
        if name in bodies and any("__gpu$xla.gpu.triton" in line for line in lines):
            found = [match[1] for line in lines if (match := re.match(r"\s+(?:ROOT )?%\S+ = .*? ([\w-]+)\(", line))]
            launches += sum(one not in _NO_LAUNCH and not one.endswith("-done") for one in found)
    return launches


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", list[str]()
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name, lines = line.removeprefix("ENTRY ").split()[0].lstrip("%"), []
        elif line == "}":
            yield name, lines
        else:
            lines.append(line)


def may_dequantize(type_name: str, program: Program) -> bool:
    """Whether kernels write weights for products of so many rows; of integers they never do."""
    return type_name != "ternary" and program.tokens > ops.PACKED_ROWS


def hlo_problems(
    hlo: str,
    spec: ModelSpec,
    state: Any,
    weights: Any,
    *,
    packed: bool,
    by_kernels: bool = False,
    gathers: bool = False,
) -> Iterator[str]:
    """Instructions whose results should not be in memory.

    Args:
        hlo: text of a compiled step.
        spec: its model, as one device computes it.
        state: `EngineState`, abstract, as on one device.
        weights: the model's, abstract, likewise.
        packed: no matrix of a layer may be there with one number for each element.
        by_kernels: but for what kernels write.
        gathers: weights are spread over devices: each copies its part of a layer to send it.
    """
    D, F, L = spec.dim, spec.ffn_dim, spec.num_layers
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    matrices = {"qkv": heads * D, "attn_out": D * D, "gate_up": 2 * F * D, "down": D * F}
    cache = max(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.pages))
    stacks = [leaf for leaf in jax.tree.leaves(weights) if leaf.ndim == 3 and leaf.size > _LARGE * L]
    sliced = {(_SHORT[str(leaf.dtype)], leaf.shape[1:]) for leaf in stacks}
    as_bytes = {leaf.size * leaf.dtype.itemsize for leaf in stacks}
    allowed = ("parameter", "get-tuple-element", "bitcast", *(("custom-call",) if by_kernels else ()))
    for name, dtype, shape, operation in _results(hlo):
        size = math.prod(shape)
        if size == cache and operation in _COPIES:
            yield f"{name} copies the KV cache"
        if (dtype, _without_ones(shape)) in sliced and not gathers and operation in ("fusion", "dynamic-slice", "copy"):
            yield f"{name} copies a layer's weight, {dtype}{list(shape)}, out of its stack"
        if dtype == "u8" and size in as_bytes and operation in (*_COPIES, "fusion", "bitcast-convert"):
            yield f"{name} writes a stack of weights anew, as bytes"
        for matrix, elements in matrices.items():
            if size == elements and packed and operation not in allowed:
                yield f"{name} holds {matrix} of a layer, dequantized"
            if size >= elements * L and operation in _COPIES:
                yield f"{name} copies a stack as large as all layers' {matrix}"


def _results(hlo: str) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """Name, type, shape and operation of every instruction outside of fusions, in which nothing reaches memory."""
    inside = False
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            inside = line.startswith(("%fused", "%wrapped", "%gemm_fusion"))
        match = re.match(r"\s+(?:ROOT )?%(\S+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", line)
        if match and not inside:
            yield match[1], match[2], tuple(int(n) for n in match[3].split(",") if n), match[4]


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)
