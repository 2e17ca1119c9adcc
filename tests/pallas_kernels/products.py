"""Products as `ops` puts them together: rows in the form that a kernel takes, its parts added up. All interpreted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.activations import IN_ORDER, InFields, InSpans, Rows, SpanBytes, activations, summed
from pallas_kernels.dense_matmul import dense_matmul
from pallas_kernels.planar_matmul import form_of, planar_grouped_matmul, planar_matmul
from pallas_kernels.planar_weights import PlanarFormat, PlanarStack
from pallas_kernels.ternary_matmul import ternary_matmul
from pallas_kernels.tuning import MatmulTiles


def made(x: Any, form: Any) -> Any:
    return activations(Rows(jnp.asarray(x)), form, interpret=True).inputs


def planar_product(x: Any, stack: PlanarStack, place: Any, kind: PlanarFormat, tiles: MatmulTiles) -> jax.Array:
    return summed(planar_matmul(made(x, form_of(kind, tiles)), stack, place, kind, tiles, interpret=True))


def planar_grouped_product(
    x: Any,
    stack: PlanarStack,
    used: Any,
    experts: Any,
    start: Any,
    stop: Any,
    kind: PlanarFormat,
    tiles: MatmulTiles,
    *,
    most: int,
) -> jax.Array:
    inputs = made(x, form_of(kind, tiles))
    blocks = (used, experts, start, stop)
    return summed(planar_grouped_matmul(inputs, stack, *blocks, kind, tiles, most=most, interpret=True))


def dense_product(x: Any, stack: Any, place: Any, tiles: MatmulTiles) -> jax.Array:
    return summed(dense_matmul(made(x, IN_ORDER), stack, place, tiles, interpret=True))


def ternary_product(x: Any, words: Any, scales: Any, place: Any, kind: PlanarFormat, tiles: MatmulTiles) -> jax.Array:
    return ternary_matmul(made(x, InFields(kind.plane)), words, scales, place, kind, tiles, interpret=True)


def in_two_bytes(x: Any, kind: PlanarFormat) -> np.ndarray:
    """Activations as few rows are rounded."""
    return numbers(made(np.asarray(x, np.float32), InSpans(kind.span)), kind.span)


def numbers(found: SpanBytes, span: int) -> np.ndarray:
    """What bytes and units of spans stand for."""
    high, low = np.asarray(found.codes, np.float64)
    return (256 * high + low) * np.repeat(np.asarray(found.unit, np.float64).T, span, axis=1)
