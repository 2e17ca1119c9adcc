"""Products with packed weights: right beside float64, and how fast beside XLA's own way and a dense product."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atoma_jax import ops
from atoma_jax.quant.dequantized import dequantized
from atoma_jax.quant.qtensor import QTensor
from bench.gpu_sections.protocol import Context, Measurement
from bench.kernel_times import seconds_a_call
from bench.real_models import packed_weight, random_value
from pallas_kernels import quantized_matmul

SHAPES = ((28672, 4096), (4096, 14336))  # gate_up and down of Llama-3.1-8B
ROWS = {
    "Q4_K": (1, 512, 64, 16, 4096),
    "bf16": (1, 512, 64),
    "ternary × int8": (1, 512, 64, 16, 4096),
    "Q4_0": (1, 512),
    "IQ4_NL": (1, 512),
    "W4 g128": (1, 512),
    "Q8_0": (1, 64, 512),
    "ternary": (1, 512),
}
WITH_XLA, XLA_ROWS = ("Q4_K", "Q8_0"), (1, 512)  # products that XLA makes its own way too
STACK = 8  # weights that turns go through: more than a cache holds
CHECKED = 64  # rows and out-features whose products are compared with float64
INT8, DENSE = " × int8", "bf16"
ALONE = "alone"  # a dense weight that is no part of a stack, by XLA: larger than a cache as it is
ALLOWED = 2.0**-7  # of the row's Σ|x·w|: weights of wide tiles are rounded to bfloat16, twice


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """One product, by a weight's kernel or by another way."""

    type_name: str
    rows: int
    way: str
    arguments: tuple[Any, ...]
    program: Any  # of the place in the stack and the arguments; lowered, then compiled

    def run(self, place: jax.Array) -> jax.Array:
        """With the weight at this place."""
        return self.program(place, *self.arguments)


def measure(context: Context) -> Iterator[Measurement]:
    """Every type at every shape and number of rows."""
    count = 2 if context.small else STACK
    for N, K in ((128, 512),) if context.small else SHAPES:
        lowered = list(_lowered(context, count, N, K))
        with ThreadPoolExecutor() as pool:
            products = list(pool.map(lambda one: replace(one, program=one.program.compile()), lowered))
        seconds = seconds_a_call([one.run for one in products], calls=count)
        times = {(one.type_name, one.rows, one.way): taken for one, taken in zip(products, seconds, strict=True)}
        for one in products:
            if one.way != context.kernels:
                continue
            by_xla = times.get((one.type_name, one.rows, "xla"))
            others = {"bf16": times[DENSE, one.rows, ALONE]} | ({} if by_xla is None else {"xla": by_xla})
            x, weight = one.arguments
            int8 = one.type_name.endswith(INT8)
            yield Measurement(
                name=f"{one.type_name}, {one.rows} × {K} → {N}",
                seconds=times[one.type_name, one.rows, one.way],
                moved_bytes=weight.nbytes // count + 2 * one.rows * K + 4 * one.rows * N,
                operations=2 * one.rows * N * K,
                others=others,
                error=_error(one.run(jnp.int32(1)), x, weight, int8),
                allowed=ALLOWED,
                **_target(one.type_name, one.rows, int8),
            )


def _lowered(context: Context, count: int, N: int, K: int) -> Iterator[_Product]:
    """Every product's program."""
    some_rows = {type_name: (1,) if context.small else rows for type_name, rows in ROWS.items()}
    place = jnp.int32(0)

    def inputs(rows: int) -> jax.Array:
        return jax.random.normal(jax.random.key(rows), (rows, K), jnp.bfloat16)

    plain = jax.random.normal(jax.random.key(1), (N, K), jnp.bfloat16)
    dense = jax.jit(lambda _, x, weight: quantized_matmul.dot(x, weight))
    for rows in sorted({rows for some in some_rows.values() for rows in some}):
        arguments = inputs(rows), plain
        program = dense.lower(place, *arguments)
        yield _Product(type_name=DENSE, rows=rows, way=ALONE, arguments=arguments, program=program)
    for type_name, some in some_rows.items():
        weight = _weight(type_name.removesuffix(INT8), count, N, K)
        for way, rows in itertools.product((context.kernels, "xla"), some):
            if way == "xla" and (type_name not in WITH_XLA or rows not in XLA_ROWS):
                continue
            run = jax.jit(partial(_linear, _backend(way), int8=type_name.endswith(INT8)))
            arguments = inputs(rows), weight
            program = run.lower(place, *arguments)
            yield _Product(type_name=type_name, rows=rows, way=way, arguments=arguments, program=program)


def _linear(backend: ops.Backend, place: jax.Array, x: jax.Array, weight: Any, *, int8: bool) -> jax.Array:
    return ops.linear(x, weight, backend, layer=place, int8_activations=int8)


def _weight(type_name: str, count: int, N: int, K: int) -> Any:
    """A stack of random weights."""
    if type_name == DENSE:
        return jax.random.normal(jax.random.key(0), (count, N, K), jnp.bfloat16) * jnp.bfloat16(K**-0.5)
    return random_value(packed_weight(type_name, count, N, K))


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


def _error(got: jax.Array, x: jax.Array, weight: Any, int8: bool) -> float:
    """The largest difference to float64, as a share of Σ|x·w|, over some rows and out-features of the second weight."""
    W = _numbers(weight)
    rows = np.asarray(x[:CHECKED].astype(jnp.float32), np.float64)
    if int8:
        scale = np.float32(127) / np.abs(rows).max(axis=1, keepdims=True).astype(np.float32)
        rows = np.rint(rows.astype(np.float32) * scale).astype(np.float64) / scale
    difference = np.abs(np.asarray(got[:CHECKED, :CHECKED], np.float64) - rows @ W.T)
    return float((difference / (np.abs(rows) @ np.abs(W).T)).max())


def _numbers(weight: Any) -> np.ndarray:
    """What the first out-features of a weight stand for."""
    chosen = slice(0, CHECKED)
    if not isinstance(weight, QTensor):
        return np.asarray(weight[1, chosen].astype(jnp.float32), np.float64)
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
    return dequantized(part).astype(np.float64)
