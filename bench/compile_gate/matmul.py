"""The compile gate's cases of products with packed weights, as `ops` chooses them, at the shapes of real models."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct

from atoma_jax import ops
from atoma_jax.ops.kernel_linear import format_of
from atoma_jax.quant.qtensor import QTensor
from bench.compile_gate.cases import KernelCase
from bench.real_models import packed_weight
from pallas_kernels.planar_matmul import blocks_of_turn
from pallas_kernels.tuning import matmul_tiles

LAYERS = 4  # of a stack: more change nothing
BACKEND = ops.Backend(platform="cuda", operands="bfloat16", weight_layout="planar", kernels="pallas")
QUICK = frozenset(["Q4_0", "Q4_K", "IQ4_NL", "Q8_0", "W4 g128 mins"])
TYPES = (*sorted(QUICK), "W4 g128", "Q2_K", "Q5_K", "Q6_K", "ternary")

# Out-features and inputs of the widest and of the deepest product of a layer, and a type that files of it have.
MODELS: dict[str, tuple[tuple[str, ...], tuple[tuple[int, int], ...]]] = {
    "Llama-3.1-8B": (("Q4_K", "Q8_0"), ((28672, 4096), (4096, 14336))),
    "Qwen3-0.6B": (("Q4_K", "Q8_0"), ((6144, 1024), (1024, 3072))),
    "Gemma 3 4B": (("Q4_0", "Q6_K"), ((20480, 2560), (2560, 10240))),
    "BitNet 2B4T": (("ternary", "ternary × int8"), ((13824, 2560), (2560, 6912))),
}


def case(type_name: str, M: int, N: int, K: int, *, model: str = "", quick: bool = False) -> KernelCase:
    """A product of M rows with a weight `[N, K]`; "× int8" in the type: of activations of eight bits."""
    kind, int8 = type_name.removesuffix(" × int8"), type_name.endswith(" × int8")
    weight = packed_weight(kind, LAYERS, N, K)
    kernel = "ternary_matmul" if int8 else "planar_matmul"
    tiles = matmul_tiles(BACKEND.device, kernel, M=M, N=N, K=K, bits=weight.bits, group=weight.group)
    blocks = 1 if int8 else blocks_of_turn(format_of(weight), tiles)
    weights = blocks * tiles.block_n * weight.plane * (16 // weight.bits) / (32 * tiles.warps)
    if not int8 and M > ops.PACKED_ROWS:
        kernel, weights = "planar_dequantized", None  # which has no loop
    return KernelCase(
        name=f"{model + ': ' if model else ''}{type_name}, {M} × {K} → {N}",
        kernel=f"^{kernel}",
        function=partial(_linear, int8=int8),
        arguments=(ShapeDtypeStruct((M, K), jnp.bfloat16), weight, ShapeDtypeStruct((), jnp.int32)),
        weights=weights,
        quick=quick,
    )


def grouped_case(type_name: str, T: int, *, used: int, count: int, N: int, K: int, quick: bool = False) -> KernelCase:
    """A mixture's products: T tokens, each with `used` of `count` experts of weights `[2N, K]` and `[K, N]`."""
    gate_up, down = (_experts(type_name, count, *shape) for shape in ((2 * N, K), (K, N)))
    return KernelCase(
        name=f"{type_name}, {used} of {count} experts, {T} × {K} → {2 * N} → {K}",
        kernel="^planar_grouped_matmul",
        function=_mixture,
        arguments=(
            ShapeDtypeStruct((T, K), jnp.float32),
            ShapeDtypeStruct((T, used), jnp.int32),
            ShapeDtypeStruct((T, used), jnp.float32),
            gate_up,
            down,
            ShapeDtypeStruct((), jnp.int32),
        ),
        quick=quick,
    )


def _experts(type_name: str, count: int, N: int, K: int) -> QTensor:
    """Of all layers: one more axis than a stack."""
    return jax.tree.map(
        lambda part: ShapeDtypeStruct((LAYERS, count, *part.shape[1:]), part.dtype),
        packed_weight(type_name, 1, N, K),
    )


def _linear(x: jax.Array, weight: QTensor, layer: jax.Array, *, int8: bool, device: str) -> jax.Array:
    return ops.linear(x, weight, replace(BACKEND, device=device), layer=layer, int8_activations=int8)


def _mixture(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    gate_up: QTensor,
    down: QTensor,
    layer: jax.Array,
    *,
    device: str,
) -> jax.Array:
    def activate(h: jax.Array) -> jax.Array:
        return jax.nn.silu(h[:, : h.shape[1] // 2]) * h[:, h.shape[1] // 2 :]

    return ops.grouped_feed_forward(
        x,
        experts,
        weights,
        gate_up,
        down,
        activate,
        replace(BACKEND, device=device),
        layer=layer,
        int8_activations=False,
    )


def dense_case(M: int, N: int, K: int, *, quick: bool = False) -> KernelCase:
    """A product of M rows with one of a stack of bfloat16 weights."""
    stack = ShapeDtypeStruct((LAYERS, N, K), jnp.bfloat16)
    return KernelCase(
        name=f"bf16, {M} × {K} → {N}",
        kernel="^dense_matmul",
        function=partial(_linear, int8=False),
        arguments=(ShapeDtypeStruct((M, K), jnp.bfloat16), stack, ShapeDtypeStruct((), jnp.int32)),
        quick=quick,
    )


CASES = [
    *(dense_case(M, 4096, 4096, quick=M == 1) for M in (1, 64, 512)),
    *(
        case(type_name, M, 4096, 4096, quick=type_name in QUICK and M in (1, 128))
        for type_name in TYPES
        for M in (1, 64, 128, 512)
    ),
    *(
        case(type_name, M, N, K, model=model, quick=type_name == "ternary × int8" and M == 1 and K == 6912)
        for model, (types, shapes) in MODELS.items()
        for type_name in types
        for N, K in shapes
        for M in (1, 128)
    ),
    grouped_case("Q4_K", 1, used=8, count=128, N=768, K=2048, quick=True),  # Qwen3-30B-A3B
    grouped_case("Q4_K", 512, used=8, count=128, N=768, K=2048),
    grouped_case("Q8_0", 512, used=2, count=8, N=14336, K=4096),  # Mixtral-8x7B
]
