"""The compile gate says what a regression is, and finds copies of weights and of the cache in a step's HLO."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from atoma_jax.ops import Backend
from bench.compile_gate import table
from bench.compile_gate.steps import LAYERS, hlo_problems
from bench.real_models import LLAMA_8B, abstract_values, with_type

ROW: dict[str, Any] = {
    "registers": 96,
    "spill_bytes": 0,
    "shared_memory": 57344,
    "threads": 128,
    "tensor_core": 16,
    "operations_a_weight": 2.0,
}
KNOWN = {"jax": "1", "cases": {"a": {"h200": ROW}}}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spill_bytes": 4}, "spills 4 bytes"),
        ({"registers": 112}, "112 registers, 96 in the table"),
        ({"shared_memory": 57345}, "57345 bytes of shared memory"),
        ({"operations_a_weight": 2.2}, "2.2 operations a weight, 2.0 in the table"),
        ({"tensor_core": 0}, "no longer uses the matrix units"),
    ],
)
def test_what_a_kernel_takes_more_is_a_regression(change: dict[str, Any], problem: str) -> None:
    (found,) = table.problems("a", "h200", ROW | change, KNOWN, same_jax=True)
    assert problem in found


def test_less_and_rounding_are_none_and_another_jax_is_held_to_spills_alone() -> None:
    better = ROW | {"registers": 104, "operations_a_weight": 1.5}
    assert not table.problems("a", "h200", better, KNOWN, same_jax=True)
    assert not table.problems("a", "h200", ROW | {"registers": 200}, KNOWN, same_jax=False)
    assert table.problems("a", "h200", ROW | {"spill_bytes": 8}, KNOWN, same_jax=False)
    assert "is not in kernels.json" in table.problems("b", "h200", ROW, KNOWN, same_jax=True)[0]


def problems(type_name: str, instruction: str) -> list[str]:
    """Of a step of four layers of Llama-3.1-8B that holds an instruction."""
    backend = Backend(platform="cuda", operands="bfloat16", weight_layout="planar", kernels="pallas")
    spec = with_type(LLAMA_8B, type_name)
    values = abstract_values(spec, type_name, backend)
    state: Any = SimpleNamespace(pages=[jax.ShapeDtypeStruct((LAYERS, 512, 8, 16, 128), jnp.bfloat16)])
    hlo = f"ENTRY %main (p: s32[]) -> s32[] {{\n  {instruction}\n}}\n"
    return list(hlo_problems(hlo, spec, state, values, packed=type_name != "bf16"))


@pytest.mark.parametrize(
    ("type_name", "instruction", "problem"),
    [
        ("bf16", "%f.1 = bf16[1,4096,14336]{2,1,0} fusion(%p, %i), kind=kLoop", "f.1 copies a layer's weight"),
        ("Q4_K", "%d = u16[28672,1024]{1,0} dynamic-slice(%p, %i)", "d copies a layer's weight"),
        ("Q4_K", "%w = bf16[4096,14336]{1,0} fusion(%p), kind=kLoop", "w holds down of a layer, dequantized"),
        ("Q4_K", "%c = bf16[4,512,8,16,128]{4,3,2,1,0} copy(%p)", "c copies the KV cache"),
        ("ternary", "%b = u8[32,4096,3584]{2,1,0} fusion(%p), kind=kLoop", "b writes a stack of weights anew"),
    ],
)
def test_copies_in_a_step_are_found(type_name: str, instruction: str, problem: str) -> None:
    assert problem in problems(type_name, instruction)[0]


@pytest.mark.parametrize(
    "instruction",
    [
        "%a = bf16[512,4096]{1,0} fusion(%p), kind=kLoop",  # activations
        "%k = (bf16[4,512,8,16,128]{4,3,2,1,0}) custom-call(%p)",  # a kernel that writes into the cache
        "%p.1 = u16[32,28672,1024]{2,1,0} parameter(1)",
    ],
)
def test_what_belongs_there_is_left_alone(instruction: str) -> None:
    assert not problems("Q4_K", instruction)
