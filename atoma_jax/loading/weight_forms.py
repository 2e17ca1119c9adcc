"""How each weight of a model lies on the device, from a checkpoint's headers alone: types, shapes, layout.

Layers are stacked, so all tensors of one weight share a form. Where a file mixes types, they meet in a format that
holds each exactly (`quant/merging.py`), or, in the packed layout, layers of different formats are stacked apart. Reads
no weights.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np
from jax import numpy as jnp

from atoma_jax.errors import UnsupportedModelError
from atoma_jax.loading.checkpoint import Checkpoint, StoredTensor
from atoma_jax.loading.weight_sources import WeightSource, layer_source, stacked_source
from atoma_jax.models.params import ParamSpec
from atoma_jax.ops import Backend
from atoma_jax.quant.groups import GroupFormat
from atoma_jax.quant.merging import merged_format, widened
from atoma_jax.quant.qtensor import (
    PLANAR_WIDTHS,
    TILE,
    TILE_BLOCK,
    LayerVariants,
    Layout,
    QTensor,
    planar_plane,
    planar_width,
    tile_groups,
)

Shape: TypeAlias = tuple[int, ...]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseForm:
    """A weight that is no `QTensor`."""

    shape: Shape  # leading axes included
    dtype: jnp.dtype[Any]

    def abstract(self) -> jax.ShapeDtypeStruct:
        """The array without its values."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedForm:
    """What all tensors of one quantized weight agree on.

    Attributes:
        layout: as in `QTensor`.
        lead: axes before a child's own.
        shape: (N, K).
        format: of codes and factors; the rows layout keeps signed numbers and float32 factors instead.
        plane: elements of a plane of the planar layout; 0 in others.
        permuted: columns are in an order of their own.
    """

    layout: Layout
    lead: Shape
    shape: tuple[int, int]
    format: GroupFormat
    plane: int
    permuted: bool

    @property
    def codes(self) -> jax.ShapeDtypeStruct:
        """The codes without their values."""
        N, K = self.shape
        if self.layout == "rows":
            dtype = np.uint8 if self.format.float_codes else np.int8
            return jax.ShapeDtypeStruct((*self.lead, N, K // self.format.group, self.format.group), dtype)
        if self.layout == "tiles":
            tiles, blocks = -(-N // TILE), -(-K // TILE_BLOCK)
            shape = (*self.lead, tiles, blocks, TILE * TILE_BLOCK * self.format.bits // 8)
            return jax.ShapeDtypeStruct(shape, np.uint8)
        return jax.ShapeDtypeStruct((*self.lead, N, K * self.format.bits // 16), np.uint16)

    @property
    def scales(self) -> jax.ShapeDtypeStruct:
        """The scales without their values."""
        return self._factors(self.format.scale_dtype, self.format.group)

    @property
    def mins(self) -> jax.ShapeDtypeStruct | None:
        """The mins without their values."""
        return None if self.format.min_dtype is None else self._factors(self.format.min_dtype, self.format.group)

    @property
    def scale_supers(self) -> jax.ShapeDtypeStruct | None:
        """What integer scales are multiplied by, without its values."""
        if self.layout == "rows" or self.format.supergroup is None:
            return None
        return self._factors(np.dtype(np.float32), self.format.supergroup)

    @property
    def min_supers(self) -> jax.ShapeDtypeStruct | None:
        """Likewise for mins."""
        return self.scale_supers if self.format.min_dtype == np.int8 else None

    @property
    def permutation(self) -> jax.ShapeDtypeStruct | None:
        """The order of columns without its values."""
        return jax.ShapeDtypeStruct((*self.lead, self.shape[1]), np.int32) if self.permuted else None

    def _factors(self, dtype: np.dtype[Any], group: int) -> jax.ShapeDtypeStruct:
        N, G = self.shape[0], self.shape[1] // group
        if self.layout == "rows":
            return jax.ShapeDtypeStruct((*self.lead, N, G), np.float32)
        if self.layout == "tiles":
            filled = tile_groups(self.shape[1], group)
            assert filled is not None, self
            return jax.ShapeDtypeStruct((*self.lead, -(-N // TILE), filled, TILE), dtype)
        return jax.ShapeDtypeStruct((*self.lead, G, N), dtype)

    def children(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Those that the weight has, by the names of `QTensor`'s fields."""
        every = {
            "codes": self.codes,
            "scales": self.scales,
            "mins": self.mins,
            "scale_supers": self.scale_supers,
            "min_supers": self.min_supers,
            "permutation": self.permutation,
        }
        return {name: child for name, child in every.items() if child is not None}

    def qtensor(self, children: dict[str, Any]) -> QTensor:
        """The weight of its children; `Any` as a plan has `ShapeDtypeStruct`s in the place of arrays."""
        rows = self.layout == "rows"
        numbers = rows or (self.layout == "tiles" and self.format.bits == 8)
        return QTensor(
            codes=children["codes"],
            scales=children["scales"],
            mins=children.get("mins"),
            scale_supers=children.get("scale_supers"),
            min_supers=children.get("min_supers"),
            permutation=children.get("permutation"),
            layout=self.layout,
            shape=self.shape,
            group=self.format.group,
            bits=8 if rows else self.format.bits,
            zero=0 if numbers else self.format.zero,
            table=None if numbers else self.format.table,
            plane=self.plane,
        )

    def abstract(self) -> QTensor:
        """The weight without its values."""
        return self.qtensor(dict(self.children()))


Form: TypeAlias = DenseForm | QuantizedForm


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantsForm:
    """A weight whose layers have several forms.

    Attributes:
        stacks: for each form, where its layers are in the checkpoint.
        which: stack of each layer.
        place: and where it is in there.
    """

    stacks: tuple[tuple[Form, WeightSource], ...]
    which: tuple[int, ...]
    place: tuple[int, ...]

    def variants(self, stacks: Sequence[Any]) -> LayerVariants:
        """The weight of its stacks, filled or abstract."""
        return LayerVariants(stacks=tuple(stacks), which=self.which, place=self.place)

    def abstract(self) -> LayerVariants:
        """The weight without its values."""
        return self.variants([form.abstract() for form, _ in self.stacks])


def form_of(checkpoint: Checkpoint, source: WeightSource, want: ParamSpec, backend: Backend) -> Form | VariantsForm:
    """How a weight lies on the device.

    Raises:
        UnsupportedModelError: the backend's layout cannot hold it.
    """
    # A code takes a byte in rows whatever its format: there, one stack costs little and programs stay small.
    if not want.quantizable or not want.stacked or backend.weight_layout == "rows":
        return _one_form(checkpoint, source, want, backend)
    layers = [layer_source(source, layer) for layer in range(source.lead[0])]
    kinds = [_common_format(checkpoint, layer) for layer in layers]
    if backend.weight_layout == "planar":  # what it widens to one width is one format
        kinds = [None if kind is None else widened(kind, planar_width(kind.bits)) for kind in kinds]
    distinct = list(dict.fromkeys(kinds))
    if len(distinct) == 1:
        return _one_form(checkpoint, source, want, backend)
    which = tuple(distinct.index(kind) for kind in kinds)
    stacks = [
        stacked_source([layer for layer, number in zip(layers, which, strict=True) if number == own])
        for own in range(len(distinct))
    ]
    return VariantsForm(
        stacks=tuple((_one_form(checkpoint, stack, want, backend), stack) for stack in stacks),
        which=which,
        place=tuple(which[:layer].count(number) for layer, number in enumerate(which)),
    )


def _one_form(checkpoint: Checkpoint, source: WeightSource, want: ParamSpec, backend: Backend) -> Form:
    kind = _common_format(checkpoint, source) if want.quantizable else None
    if kind is None:
        lead = source.lead if len(want.shape) <= 2 else source.lead[:1]
        return DenseForm(shape=(*lead, *want.shape), dtype=_dense_dtype(checkpoint, source, want, backend))
    N, K = want.shape[-2:]
    layout: Layout = "rows" if kind.float_codes else backend.weight_layout
    plane = 0
    if layout == "planar":
        kind, plane = _planar_format(checkpoint, source, K, kind)
    if layout == "tiles" and tile_groups(K, kind.group) is None:
        layout = "rows"  # groups of 8, or of 48: XLA multiplies them
    tensors = (checkpoint.tensors[part.tensor] for parts in source.blocks for part in parts)
    return QuantizedForm(
        layout=layout,
        lead=source.lead,
        shape=(N, K),
        format=kind,
        plane=plane,
        permuted=any(tensor.permutation is not None for tensor in tensors),
    )


def _dense_dtype(checkpoint: Checkpoint, source: WeightSource, want: ParamSpec, backend: Backend) -> jnp.dtype[Any]:
    """Norms and biases are small and stay wide. On a CPU, XLA would widen a narrow weight again in every step; native
    kernels, which multiply all but experts, read it as the file has it."""
    if not want.quantizable:
        return jnp.dtype(jnp.float32)
    if backend.platform != "cpu":
        return jnp.dtype(backend.operands)
    stored = {checkpoint.tensors[part.tensor].float_dtype for parts in source.blocks for part in parts}
    if backend.kernels == "native" and len(want.shape) == 2 and len(stored) == 1:
        return jnp.dtype(stored.pop())
    return jnp.dtype(jnp.float32)


def _common_format(checkpoint: Checkpoint, source: WeightSource) -> GroupFormat | None:
    """What the parts of a weight can all be kept in; None: as floats."""
    tensors = {part.tensor: checkpoint.tensors[part.tensor] for parts in source.blocks for part in parts}
    formats = [tensor.format for tensor in tensors.values() if tensor.format is not None]
    if len(formats) < len(tensors):
        if formats:
            _log.warning(_MIXED, checkpoint.path, next(iter(tensors)), "mixes quantized tensors with dense ones")
        return None
    merged = merged_format(formats)
    if merged is None:
        _log.warning(_MIXED, checkpoint.path, next(iter(tensors)), "mixes float8 with integers")
    elif not all(_same_order([checkpoint.tensors[part.tensor] for part in parts]) for parts in source.blocks):
        _log.warning(_MIXED, checkpoint.path, next(iter(tensors)), "fuses projections whose inputs are ordered apart")
        return None
    return merged


_MIXED = "%s: the weight that %r is a part of %s: it is kept as floats, exact and larger"


def _same_order(tensors: list[StoredTensor]) -> bool:
    orders = [tensor.permutation for tensor in tensors]
    return len({None if order is None else order.tobytes() for order in orders}) == 1


def _planar_format(checkpoint: Checkpoint, source: WeightSource, K: int, kind: GroupFormat) -> tuple[GroupFormat, int]:
    """The format with codes as wide as K inputs need to fill whole words, and the elements of a plane."""
    for bits in PLANAR_WIDTHS:
        plane = planar_plane(K, math.gcd(kind.group, K), bits)
        if bits >= kind.bits and plane is not None:
            return widened(kind, bits), plane
    field = f"{checkpoint.path}: tensor {source.blocks[0][0].tensor!r}"
    raise UnsupportedModelError(field, K, "must have a multiple of 32 inputs in groups of 16 for this device's kernels")
