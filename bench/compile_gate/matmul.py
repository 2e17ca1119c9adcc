"""The compile gate's cases of products with packed weights, at the shapes of real models."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct

from bench.compile_gate.cases import KernelCase
from pallas_kernels.planar_matmul import PlanarFormat, PlanarStack, planar_matmul
from pallas_kernels.ternary_matmul import ternary_matmul
from pallas_kernels.tuning import MatmulTiles, default_tiles

LAYERS = 4  # of a stack: more change nothing

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# What files of each type have on the device; see docs/formats.md.
FORMATS: dict[str, tuple[PlanarFormat, Any, Any, int | None]] = {  # format, scales, mins, supergroup
    "W4 g128": (PlanarFormat(4, 64, 128, 8, None), jnp.float16, None, None),
    "W4 g128 mins": (PlanarFormat(4, 64, 128, 0, None), jnp.float16, jnp.float16, None),
    "Q4_0": (PlanarFormat(4, 32, 32, 8, None), jnp.float16, None, None),
    "Q4_K": (PlanarFormat(4, 32, 32, 0, None), jnp.int8, jnp.int8, 256),
    "IQ4_NL": (PlanarFormat(4, 32, 32, 0, IQ4_NL), jnp.float16, None, None),
    "Q8_0": (PlanarFormat(8, 32, 32, 128, None), jnp.float16, None, None),
    "Q5_K": (PlanarFormat(8, 32, 32, 0, None), jnp.int8, jnp.int8, 256),
    "Q6_K": (PlanarFormat(8, 16, 16, 32, None), jnp.int8, None, 256),
    "ternary": (PlanarFormat(2, 64, 0, 1, None), jnp.float32, None, None),  # one scale a row
}


def stack_of(name: str, N: int, K: int, count: int = LAYERS) -> tuple[PlanarStack, PlanarFormat]:
    """A stack of abstract weights of one of `FORMATS`."""
    kind, scales, mins, supergroup = FORMATS[name]
    kind = kind._replace(group=kind.group or K)
    G = K // kind.group
    supers = None if supergroup is None else ShapeDtypeStruct((count, K // supergroup, N), jnp.float32)
    return PlanarStack(
        words=ShapeDtypeStruct((count, N, K * kind.bits // 16), jnp.uint16),
        scales=ShapeDtypeStruct((count, G, N), scales),
        mins=None if mins is None else ShapeDtypeStruct((count, G, N), mins),
        scale_supers=supers,
        min_supers=supers if mins == jnp.int8 else None,
    ), kind


def case(name: str, M: int, N: int, K: int, *, tiles: MatmulTiles | None = None, quick: bool = False) -> KernelCase:
    """A product of M rows with a weight `[N, K]` of one of `FORMATS`."""
    stack, kind = stack_of(name, N, K)
    tiles = tiles or default_tiles("planar_matmul", M=M, N=N, K=K, bits=kind.bits, group=kind.group)
    arguments = (ShapeDtypeStruct((M, K), jnp.bfloat16), stack, ShapeDtypeStruct((), jnp.int32))
    return KernelCase(
        name=f"{name}, {M} × {K} → {N}",
        kernel="^planar_matmul",
        function=partial(_product, kind=kind, tiles=tiles),
        arguments=arguments,
        weights=tiles.block_n * kind.block / (32 * tiles.warps),
        quick=quick,
    )


def _product(
    x: jax.Array, stack: PlanarStack, index: jax.Array, *, kind: PlanarFormat, tiles: MatmulTiles
) -> jax.Array:
    return planar_matmul(x, stack, index, kind, tiles)


def ternary_case(M: int, N: int, K: int, *, quick: bool = False) -> KernelCase:
    """A product of M rows of int8 activations with a ternary weight `[N, K]`."""
    stack, kind = stack_of("ternary", N, K)
    tiles = default_tiles("ternary_matmul", M=M, N=N, K=K, bits=2, group=K)
    return KernelCase(
        name=f"ternary × int8, {M} × {K} → {N}",
        kernel="^ternary_matmul",
        function=partial(_ternary, kind=kind, tiles=tiles),
        arguments=(
            ShapeDtypeStruct((M, K), jnp.bfloat16),
            stack.words,
            stack.scales,
            ShapeDtypeStruct((), jnp.int32),
        ),
        weights=tiles.block_n * kind.block / (32 * tiles.warps),
        quick=quick,
    )


def _ternary(
    x: jax.Array, words: jax.Array, scales: jax.Array, index: jax.Array, *, kind: PlanarFormat, tiles: MatmulTiles
) -> jax.Array:
    return ternary_matmul(x, words, scales, index, kind, tiles)


CASES = [
    *(case(name, M, 4096, 4096, quick=True) for name in FORMATS for M in (1, 64, 512)),
    *(ternary_case(M, 2560, 2560, quick=True) for M in (1, 64, 512)),
]
