"""Products with packed weights: right beside float64, and how fast beside XLA's own way and a dense product."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atoma_jax import ops
from atoma_jax.quant.dequantized import dequantized
from atoma_jax.quant.qtensor import QTensor
from bench.gpu_sections.protocol import Context, Measurement
from bench.gpu_sections.timing import seconds_a_turn
from bench.real_models import packed_weight, random_value

SHAPES = ((28672, 4096), (4096, 14336))  # gate_up and down of Llama-3.1-8B
ROWS = (1, 512, 64, 16, 4096)  # those that have pass marks first
TYPES = ("Q4_0", "Q4_K", "IQ4_NL", "Q8_0", "W4 g128", "ternary")
STACK = 8  # weights that turns go through: more than a cache holds
CHECKED = 64  # out-features whose products are compared with float64
ALLOWED = 2.0**-7  # of the row's Σ|x·w|: weights of wide tiles are rounded to bfloat16, twice


def measure(context: Context) -> Iterator[Measurement]:
    """Every type at every shape and number of rows."""
    shapes, rows, count = (((128, 512),), (1,), 2) if context.small else (SHAPES, ROWS, STACK)
    for N, K in shapes:
        dense = _dense_seconds(N, K, rows, count)
        weights = {type_name: random_value(packed_weight(type_name, count, N, K)) for type_name in TYPES}
        for M in rows:
            for type_name, weight in weights.items():
                for int8 in (False, True) if type_name == "ternary" else (False,):
                    yield _product(context, type_name, weight, M, int8, dense[M])


def _product(context: Context, type_name: str, weight: QTensor, M: int, int8: bool, dense: float) -> Measurement:
    (N, K), count = weight.shape, weight.lead[0]
    backends = {name: _backend(name) for name in (context.kernels, "xla")}
    x = jax.random.normal(jax.random.key(M), (M, K), jnp.bfloat16)

    def run(backend: ops.Backend, i: Any, x: jax.Array, weight: QTensor) -> jax.Array:
        return ops.linear(x, weight, backend, layer=i % count, int8_activations=int8)

    turns = 1 if context.small else 4 * count
    seconds = {
        name: seconds_a_turn(partial(run, backend), x, weight, turns=turns) for name, backend in backends.items()
    }
    got = jax.jit(partial(run, backends[context.kernels]))(jnp.int32(1), x, weight)
    nbytes = weight.nbytes // count + 2 * M * K + 4 * M * N
    return Measurement(
        name=f"{type_name}{' × int8' if int8 else ''}, {M} × {K} → {N}",
        seconds=seconds[context.kernels],
        moved_bytes=nbytes,
        operations=2 * M * N * K,
        others={"xla": seconds["xla"], "bf16": dense},
        error=_error(got, x, weight, int8),
        allowed=ALLOWED,
        **_target(type_name, M, int8),
    )


def _target(type_name: str, M: int, int8: bool) -> dict[str, Any]:
    four_bits = type_name.startswith(("Q4", "IQ4", "W4"))
    if M == 1 and four_bits:
        return {"target": 0.65, "fraction_of": "bandwidth"}
    if M == 512 and four_bits:
        return {"target": 0.6, "fraction_of": "bf16"}
    if M == 1 and int8:
        return {"target": 0.5, "fraction_of": "bandwidth"}
    return {}


def _backend(kernels: Any) -> ops.Backend:
    platform = "cpu" if jax.default_backend() == "cpu" else "cuda"
    device = jax.devices()[0].device_kind
    return ops.Backend(platform=platform, operands="bfloat16", weight_layout="planar", kernels=kernels, device=device)


def _dense_seconds(N: int, K: int, rows: tuple[int, ...], count: int) -> dict[int, float]:
    """Of the product with a bfloat16 weight, the fastest way there is for many rows."""
    weights = jax.random.normal(jax.random.key(0), (count, N, K), jnp.bfloat16)

    def run(i: Any, x: jax.Array, weights: jax.Array) -> jax.Array:
        weight = jax.lax.dynamic_index_in_dim(weights, i % count, keepdims=False)
        return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    return {M: seconds_a_turn(run, jnp.ones((M, K), jnp.bfloat16), weights, turns=2 * count) for M in rows}


def _error(got: jax.Array, x: jax.Array, weight: QTensor, int8: bool) -> float:
    """The largest difference to float64, as a share of Σ|x·w|, over some out-features of the second weight."""
    chosen = slice(0, CHECKED)
    part = QTensor(
        codes=weight.codes[1, chosen],
        scales=weight.scales[1, :, chosen],
        mins=None if weight.mins is None else weight.mins[1, :, chosen],
        scale_supers=None if weight.scale_supers is None else weight.scale_supers[1, :, chosen],
        min_supers=None if weight.min_supers is None else weight.min_supers[1, :, chosen],
        permutation=None,
        layout=weight.layout,
        shape=(min(CHECKED, weight.shape[0]), weight.shape[1]),
        group=weight.group,
        bits=weight.bits,
        zero=weight.zero,
        table=weight.table,
        plane=weight.plane,
    )
    W = dequantized(part).astype(np.float64)
    rows = np.asarray(x.astype(jnp.float32), np.float64)
    if int8:
        scale = np.float32(127) / np.abs(rows).max(axis=1, keepdims=True).astype(np.float32)
        rows = np.rint(rows.astype(np.float32) * scale).astype(np.float64) / scale
    difference = np.abs(np.asarray(got[:, chosen], np.float64) - rows @ W.T)
    return float((difference / (np.abs(rows) @ np.abs(W).T)).max())
