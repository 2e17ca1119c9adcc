"""Weights in tiles made of random codes, in every form that kernels tell apart."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atoma_jax.loading.weight_forms import QuantizedForm
from atoma_jax.native.tiles import put_codes, put_factors
from atoma_jax.quant.groups import BF16, F16, F32, I8, Factors, GroupCodes, GroupFormat
from atoma_jax.quant.qtensor import QTensor

# What kernels tell apart: widths of codes, tables, zero points, mins, groups of half a block, types of factors.
FORMATS: dict[str, GroupFormat] = {
    "Q4_0": GroupFormat(bits=4, group=32, zero=8, scale_dtype=F16),
    "Q4_1": GroupFormat(bits=4, group=32, scale_dtype=F16, min_dtype=F16),
    "Q4_K": GroupFormat(bits=4, group=32, scale_dtype=I8, min_dtype=I8, supergroup=256),
    "Q3_K": GroupFormat(bits=3, group=16, zero=4, scale_dtype=I8, supergroup=256),
    "Q5_0": GroupFormat(bits=5, group=32, zero=16, scale_dtype=F16),
    "Q5_1": GroupFormat(bits=5, group=32, scale_dtype=F16, min_dtype=F16),
    "Q5_K": GroupFormat(bits=5, group=32, scale_dtype=I8, min_dtype=I8, supergroup=256),
    "Q6_K": GroupFormat(bits=6, group=16, zero=32, scale_dtype=I8, supergroup=256),
    "Q8_0": GroupFormat(bits=8, group=32, zero=128, scale_dtype=F16),
    "MXFP4": GroupFormat(
        bits=4, group=32, table=(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), scale_dtype=BF16
    ),
    "IQ4_XS": GroupFormat(
        bits=4,
        group=32,
        table=(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
        scale_dtype=I8,
        supergroup=256,
    ),
    "TQ2_0": GroupFormat(bits=2, group=256, zero=1, scale_dtype=F16),
    "Q2_K": GroupFormat(bits=2, group=16, scale_dtype=I8, min_dtype=I8, supergroup=256),
    "Q4_K and Q6_K": GroupFormat(bits=6, group=16, zero=32, scale_dtype=I8, min_dtype=I8, supergroup=256),
    "Q3_K and Q4_K": GroupFormat(bits=4, group=16, scale_dtype=I8, min_dtype=I8, supergroup=256),
    "Q5_1 and Q6_K": GroupFormat(bits=6, group=16, zero=32, scale_dtype=F32, min_dtype=F32),
    "GPTQ": GroupFormat(bits=4, group=128, scale_dtype=F32, min_dtype=F32),
}


@dataclass(frozen=True)
class Tiled:
    """A stack of two matrices, as it lies on the device and as numbers."""

    weight: QTensor
    values: np.ndarray  # float32 [2, N, K]


def tiled(kind: GroupFormat, N: int, K: int, seed: int = 0) -> Tiled:
    """Random weights, put in tiles in two chunks of scattered rows."""
    rng = np.random.default_rng(seed)
    form = QuantizedForm(layout="tiles", lead=(2,), shape=(N, K), format=kind, plane=0, permuted=False)
    host = {name: np.zeros(child.shape, child.dtype) for name, child in form.children().items()}
    values = []
    for matrix in range(2):
        most = min(2**kind.bits, 128 + kind.zero)  # numbers are int8
        drawn = GroupCodes(
            codes=rng.integers(0, most, (N, K), dtype=np.uint8),
            scales=_factors(rng, kind.scale_dtype, N, K, kind),
            mins=None if kind.min_dtype is None else _factors(rng, kind.min_dtype, N, K, kind),
            format=kind,
        )
        values.append(drawn.values())
        codes = drawn.codes if kind.bits < 8 else drawn.signed().view(np.uint8) ^ np.uint8(128)
        order = rng.permutation(N)
        for rows in (slice(0, N),) if matrix == 0 else (order[: N // 3], order[N // 3 :]):
            put_codes(codes[rows], kind.bits, rows, host["codes"][matrix])
            for name, factors in (("scale", drawn.scales), ("min", drawn.mins)):
                if factors is None:
                    continue
                put_factors(factors.values[rows], rows, host[f"{name}s"][matrix])
                if factors.supers is not None:
                    put_factors(factors.supers[rows], rows, host[f"{name}_supers"][matrix])
    return Tiled(form.qtensor({name: jnp.asarray(array) for name, array in host.items()}), np.stack(values))


def _factors(rng: np.random.Generator, dtype: np.dtype[Any], N: int, K: int, kind: GroupFormat) -> Factors:
    if dtype == I8:
        supers = rng.uniform(0.001, 0.01, (N, K // kind.supergroup)).astype(np.float32)
        return Factors(rng.integers(-60, 60, (N, K // kind.group)).astype(np.int8), supers)
    return Factors(rng.uniform(0.001, 0.05, (N, K // kind.group)).astype(dtype).astype(np.float32))


def activations(rows: int, K: int, seed: int = 1) -> jax.Array:
    """Of blocks that differ in size by powers of ten."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, K)) * 10.0 ** rng.integers(-3, 3, (rows, 1))
    return jnp.asarray(x, jnp.float32)
