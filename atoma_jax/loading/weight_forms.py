"""How each weight of a model lies on the device, from a file's header alone: types, shapes, layout. Reads no weights.

Layers are stacked, so all tensors of one weight share a form. Where a file mixes types, scales are repeated to the
smallest group and a type without mins gets some: every weight keeps its exact value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np
from jax import numpy as jnp

from atoma_jax.errors import UnsupportedModelError
from atoma_jax.loading.gguf import GGUFFile
from atoma_jax.loading.names import WeightSource
from atoma_jax.models.params import ParamSpec
from atoma_jax.ops import Backend
from atoma_jax.quant.ggml import GROUP_FORMATS, GroupFormat
from atoma_jax.quant.qtensor import Layout, QTensor, planar_plane

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseForm:
    """A weight that is no `QTensor`."""

    shape: Shape  # layers included
    dtype: jnp.dtype[Any]

    def abstract(self) -> jax.ShapeDtypeStruct:
        """The array without its values."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedForm:
    """What all tensors of one quantized weight agree on. Fields as in `QTensor`, but for the zero point.

    Rows hold signed codes, so that their `QTensor` has no zero point: `zero` is subtracted from a file's codes.
    """

    layout: Layout
    lead: Shape  # axes before a child's own
    shape: tuple[int, int]  # (N, K)
    group: int
    bits: int
    zero: int
    plane: int
    with_mins: bool

    @property
    def codes_shape(self) -> Shape:
        """Of the codes."""
        N, K = self.shape
        own = (N, K // self.group, self.group) if self.layout == "rows" else (N, K * self.bits // 16)
        return (*self.lead, *own)

    @property
    def codes_dtype(self) -> type[np.int8] | type[np.uint16]:
        """Of the codes."""
        return np.int8 if self.layout == "rows" else np.uint16

    @property
    def scales_shape(self) -> Shape:
        """Of scales and of mins, which are float32."""
        N, K = self.shape
        G = K // self.group
        return (*self.lead, *((N, G) if self.layout == "rows" else (G, N)))

    def qtensor(self, codes: Any, scales: Any, mins: Any) -> QTensor:
        """The weight of its children; `Any` as a plan has `ShapeDtypeStruct`s in the place of arrays."""
        return QTensor(
            codes=codes,
            scales=scales,
            mins=mins,
            layout=self.layout,
            shape=self.shape,
            group=self.group,
            bits=self.bits,
            zero=0 if self.layout == "rows" else self.zero,
            plane=self.plane,
        )

    def abstract(self) -> QTensor:
        """The weight without its values."""
        scales = jax.ShapeDtypeStruct(self.scales_shape, np.float32)
        codes = jax.ShapeDtypeStruct(self.codes_shape, self.codes_dtype)
        return self.qtensor(codes, scales, scales if self.with_mins else None)


def form_of(file: GGUFFile, source: WeightSource, want: ParamSpec, backend: Backend) -> DenseForm | QuantizedForm:
    """How a weight lies on the device.

    Raises:
        UnsupportedModelError: the backend's layout cannot hold it.
    """
    lead = (len(source.layers),) if source.stacked else ()
    types = {file.tensors[part.tensor].type for parts in source.layers for part in parts}
    if not want.quantizable or not all(kind in GROUP_FORMATS for kind in types):
        # Norms and biases are small, and XLA:CPU would widen a bfloat16 weight again in every step.
        wide = not want.quantizable or backend.platform == "cpu"
        return DenseForm(shape=(*lead, *want.shape), dtype=jnp.dtype("float32" if wide else backend.operands))
    N, K = want.shape
    formats = [GROUP_FORMATS[kind] for kind in types]
    group, with_mins = min(kind.group for kind in formats), any(kind.has_mins for kind in formats)
    if backend.weight_layout == "rows":
        bits, zero, plane = 8, 0, 0
    else:
        bits = max(kind.bits for kind in formats)
        zero = _planar_zero(formats, bits, with_mins)
        plane = _plane(file, source, K, group, bits)
    return QuantizedForm(
        layout=backend.weight_layout,
        lead=lead,
        shape=(N, K),
        group=group,
        bits=bits,
        zero=zero,
        plane=plane,
        with_mins=with_mins,
    )


def _planar_zero(formats: Sequence[GroupFormat], bits: int, with_mins: bool) -> int:
    """The zero point of unsigned codes of several types.

    Eight bits have room for the largest one: types with a smaller one have their codes shifted up. Four-bit codes with
    mins have none: that of Q4_0 becomes a min, and s·c − s·z is exact there, as s has eleven significant bits.
    """
    return 0 if bits == 4 and with_mins else max(kind.zero for kind in formats)


def _plane(file: GGUFFile, source: WeightSource, K: int, group: int, bits: int) -> int:
    plane = planar_plane(K, group, bits)
    if plane is None:
        multiple = 16 * 16 // bits  # the smallest plane, and as many planes as a word has fields
        field = f"{file.path}: tensor {source.layers[0][0].tensor!r}"
        raise UnsupportedModelError(field, K, f"must have a multiple of {multiple} inputs for this device's kernels")
    return plane
