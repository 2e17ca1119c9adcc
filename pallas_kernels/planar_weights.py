"""Weights in the planar layout as kernels see them: their format, their arrays, and how scales and mins are read.

The layout itself is described in `quantized_matmul.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from pallas_kernels.tuning import TOGETHER


class PlanarStack(NamedTuple):
    """Weights `[N, K]` in the planar layout, S of them: arrays, their shapes, or a kernel's refs."""

    words: Any  # uint16 [S, N, K·bits/16]
    scales: Any  # number [S, G, N]
    mins: Any  # likewise, or None
    scale_supers: Any  # f32 [S, supergroups, N], or None
    min_supers: Any  # likewise


class PlanarFormat(NamedTuple):
    """What codes mean; as the fields of `QTensor`."""

    bits: int
    plane: int
    group: int
    zero: int
    table: tuple[int, ...] | None

    @property
    def block(self) -> int:
        """Elements along K of one block of words."""
        return self.plane * 16 // self.bits

    @property
    def span(self) -> int:
        """Inputs that share a scale in one block: a group, or the block where a group is larger."""
        return min(self.group, self.block)

    @property
    def spans(self) -> int:
        """Of a block."""
        return self.block // self.span

    @property
    def together(self) -> int:
        """Planes that are multiplied at once where weights are scaled."""
        return max(1, min(16 // self.bits, TOGETHER // self.plane))

    @property
    def is_aligned(self) -> bool:
        """Whether groups are whole blocks, or blocks whole groups: what the kernels want."""
        return self.group % self.plane == 0 and (self.block % self.group == 0 or self.group % self.block == 0)


def present(parts: Sequence[Any]) -> list[Array]:
    """The arrays that there are, as a kernel gets them."""
    return [part for part in parts if part is not None]


def named(refs: Sequence[Any], *arrays: Any) -> list[Any]:
    """Refs in the form of the arrays that a kernel got, None where there is none."""
    rest = iter(refs)
    return [type(parts)(*(None if part is None else next(rest) for part in parts)) for parts in arrays]


def stored_factors(stack: PlanarStack, at: tuple[Any, Any, Any], mask: Array) -> list[Array]:
    """Scales and mins as they lie in memory, each with what multiplies it; `at`: weight, group, out-features."""
    index, group, feature = at
    found: list[Array] = []
    for values, supers in ((stack.scales, stack.scale_supers), (stack.mins, stack.min_supers)):
        if values is None:
            continue
        found.append(load(values, at, mask))
        if supers is not None:
            above = lax.div(group, jnp.int32(values.shape[1] // supers.shape[1]))
            found.append(load(supers, (index, above, feature), mask))
    return found


def factors_of(stored: list[Array], stack: PlanarStack) -> tuple[Array, Array | None]:
    """Scales and mins in float32."""
    rest = list(stored)

    def number(supers: Any) -> Array:
        found = rest.pop(0).astype(jnp.float32)
        return found if supers is None else found * rest.pop(0)

    scale = number(stack.scale_supers)
    return scale, None if stack.mins is None else number(stack.min_supers)


def load(ref: Any, index: tuple[Any, ...], mask: Array) -> Array:
    """Elements where the mask holds, zeros elsewhere."""
    return plt.load(ref.at[index], mask=mask, other=np.zeros((), ref.dtype)[()])
