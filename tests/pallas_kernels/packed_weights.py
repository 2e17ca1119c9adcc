"""Random packed weights of every kind, with their exact values in float64."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.planar_weights import PlanarFormat, PlanarStack
from pallas_kernels.quantized_matmul import pack_planar

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Packed:
    """S weights. `sizes` are |scale · number| + |min|: what an error may be relative to."""

    stack: PlanarStack
    kind: PlanarFormat
    values: np.ndarray  # float64 [S, N, K]
    sizes: np.ndarray


def packed(kind: PlanarFormat, *, S: int, N: int, K: int, mins: bool = False, supergroup: int | None = None) -> Packed:
    """S random weights `[N, K]`; scales and mins are float16, or int8 times a float32 of their supergroup."""
    rng = np.random.default_rng(N + K + kind.bits)
    codes = rng.integers(0, 2**kind.bits, (S, N, K)).astype(np.uint8)
    G = K // kind.group

    def factors(low: float, high: float) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        if supergroup is None:
            values = rng.uniform(low, high, (S, G, N)).astype(np.float16)
            return values, None, values.astype(np.float64)
        integers = rng.integers(-30, 64, (S, G, N)).astype(np.int8)
        supers = rng.uniform(5e-4, 2e-3, (S, K // supergroup, N)).astype(np.float32)
        flat = integers.astype(np.float32) * np.repeat(supers, supergroup // kind.group, axis=1)
        return integers, supers, flat.astype(np.float64)

    def wide(flat: np.ndarray) -> np.ndarray:
        return np.repeat(flat.transpose(0, 2, 1), kind.group, axis=2)  # [S, N, K]

    scales, scale_supers, flat = factors(0.01, 0.05)
    numbers = codes.astype(np.float64) - kind.zero if kind.table is None else np.asarray(kind.table, float)[codes]
    values = numbers * wide(flat)
    sizes, lows, low_supers = np.abs(values), None, None
    if mins:
        lows, low_supers, flat = factors(-0.3, 0.3)
        values, sizes = values - wide(flat), sizes + np.abs(wide(flat))
    words = np.stack([pack_planar(matrix, kind.bits, kind.plane) for matrix in codes])
    parts = (words, scales, lows, scale_supers, low_supers)
    return Packed(PlanarStack(*(None if part is None else jnp.asarray(part) for part in parts)), kind, values, sizes)


def activations(M: int, K: int, seed: int = 0) -> np.ndarray:
    """Random rows that bfloat16 holds exactly, as float32."""
    x = np.random.default_rng(seed).standard_normal((M, K)).astype(np.float32)
    return np.array(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32))  # a copy, that tests may write to


def index(value: int) -> jax.Array:
    return jnp.int32(value)
