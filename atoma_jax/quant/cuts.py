"""Where quantized weights can be cut: which of a `QTensor`'s own axes run along N and K, and what a part of it is.

Along N any cut is right. Along K every array has to fall into whole parts: blocks of codes, groups and supergroups;
a single group of all inputs, and a supergroup of all of them, go to every part.
"""

import math
from dataclasses import replace
from typing import Literal

import jax

from atoma_jax.quant.qtensor import Layout, QTensor

Side = Literal["N", "K"]

_ROWS: dict[str, tuple[Side | None, ...]] = {
    "codes": ("N", "K", None),
    "scales": ("N", "K"),
    "mins": ("N", "K"),
    "permutation": ("K",),
}
_PLANAR: dict[str, tuple[Side | None, ...]] = {
    "codes": ("N", "K"),
    "scales": ("K", "N"),
    "mins": ("K", "N"),
    "scale_supers": ("K", "N"),
    "min_supers": ("K", "N"),
    "permutation": ("K",),
}
SIDES: dict[Layout, dict[str, tuple[Side | None, ...]]] = {"rows": _ROWS, "planar": _PLANAR}


def sides_of(weight: QTensor, child: str) -> tuple[Side | None, ...]:
    """What each own axis of a child runs along; None for one that is never cut."""
    sides = SIDES[weight.layout][child]
    array = getattr(weight, child)
    if weight.layout == "rows" and weight.codes.shape[-2] == 1:  # one group of all inputs
        return ("N", None, "K") if child == "codes" else tuple("N" if side == "N" else None for side in sides)
    own = array.shape[array.ndim - len(sides) :]
    if child not in ("codes", "permutation"):
        return tuple(None if side == "K" and size == 1 else side for side, size in zip(sides, own, strict=True))
    return sides


def parts_along_inputs(weight: QTensor) -> int:
    """Parts of equal size that a weight has along K at most: it can be cut into each divisor of this number."""
    K = weight.shape[1]
    if weight.layout == "rows":
        groups = weight.codes.shape[-2]
        return K if groups == 1 else groups
    block = weight.plane * (16 // weight.bits)
    counts = [K // block]
    for child in (weight.scales, weight.mins, weight.scale_supers, weight.min_supers):
        if child is not None and child.shape[-2] > 1:
            counts.append(child.shape[-2])
    return math.gcd(*counts)


def part_of(weight: QTensor) -> QTensor:
    """A weight whose arrays are those of one part, with the shape and group that follow from them."""
    own = weight.codes.shape
    if weight.layout == "rows":
        return replace(weight, shape=(own[-3], own[-2] * own[-1]), group=own[-1])
    K = own[-1] * 16 // weight.bits
    return replace(weight, shape=(own[-2], K), group=K // weight.scales.shape[-2])


def parts_of_tree(tree: object) -> object:
    """`part_of` for every quantized weight of a tree."""
    return jax.tree.map(
        lambda leaf: part_of(leaf) if isinstance(leaf, QTensor) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )
