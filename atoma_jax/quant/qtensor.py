"""Quantized weights on the device: `QTensor`, and `LayerVariants` where layers differ. Products are in `ops`."""

from dataclasses import dataclass, field
from typing import Literal, no_type_check

import jax
from jaxtyping import Array

Layout = Literal["rows", "planar", "tiles"]

PLANAR_WIDTHS = (2, 4, 8)  # bits of a code in the planar layout
TILE = 32  # rows of a weight that lie together in the tiles layout
TILE_BLOCK = 32  # and inputs


@no_type_check  # JAX also fills it with abstract values
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class QTensor:
    """A weight `[N, K]` of groups of `group` elements along K: `scale · (number − zero) − min`.

    A number is a code, or `table[code]`. Scales and mins are floats, or integers that are multiplied by a float32 of
    their supergroup. Layouts are described in `pallas_kernels/quantized_matmul.py`. Leading axes, such as layers and
    experts, come before all of a child's own. In the rows layout a code is its own number and `zero` is 0.
    """

    codes: Array  # rows: int8, or e4m3's bits as uint8 [*lead, N, K/g, g]; planar: uint16 [*lead, N, K·bits/16]
    scales: Array  # rows: f32 [*lead, N, K/g]; planar: float or int8 [*lead, K/g, N]
    mins: Array | None  # as scales, in a type of their own
    scale_supers: Array | None  # planar: f32 [*lead, K/supergroup, N], where scales are int8
    min_supers: Array | None  # likewise
    permutation: Array | None  # int32 [*lead, K]: the weight's column j is multiplied by x[permutation[j]]
    layout: Layout = field(metadata={"static": True})
    shape: tuple[int, int] = field(metadata={"static": True})  # (N, K)
    group: int = field(metadata={"static": True})
    bits: int = field(metadata={"static": True})  # of a stored code; rows: 8; planar: 2, 4 or 8; tiles: 3, 5 and 6 too
    zero: int = field(metadata={"static": True})
    table: tuple[int, ...] | None = field(metadata={"static": True})
    plane: int = field(metadata={"static": True})  # planar: elements of a plane; rows: 0

    @property
    def lead(self) -> tuple[int, ...]:
        """Axes before a child's own."""
        return self.codes.shape[: -2 if self.layout == "planar" else -3]

    @property
    def nbytes(self) -> int:
        """Bytes on all devices together."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


@no_type_check  # JAX also fills it with abstract values
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerVariants:
    """A weight of all layers whose formats differ: the layers of each format are a stack of their own.

    So that a file that mixes types, as most of llama.cpp's do, takes no more room than its types ask for.
    """

    stacks: tuple[QTensor | Array, ...]  # each with an axis of its layers first
    which: tuple[int, ...] = field(metadata={"static": True})  # stack of each layer
    place: tuple[int, ...] = field(metadata={"static": True})  # and where it is in there

    @property
    def nbytes(self) -> int:
        """Bytes on all devices together."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def planar_width(bits: int) -> int:
    """Bits that the planar layout stores a code of `bits` bits in."""
    return next(width for width in PLANAR_WIDTHS if width >= bits)


def planar_plane(K: int, group: int, bits: int) -> int | None:
    """Elements of a plane of the planar layout for K inputs: the most that divide both group and K; None if none do."""
    planes = 16 // bits
    return next((plane for plane in (64, 32, 16) if group % plane == 0 and K % (plane * planes) == 0), None)


def tile_groups(K: int, group: int) -> int | None:
    """Groups of a row of K inputs in the tiles layout, whose blocks are filled up; None if it does not hold them."""
    blocks = -(-K // TILE_BLOCK)
    if group == K:
        return 1
    if group == TILE_BLOCK // 2:
        return 2 * blocks
    return K // group if group % TILE_BLOCK == 0 else None
