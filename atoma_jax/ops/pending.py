"""Rows that are not computed yet: sums, norms and attention that the next product's kernel may take in, so that nobody
writes them. Whoever needs an array asks for it: `computed`.
"""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, Float32, Int32

from atoma_jax.ops.backend import Backend
from atoma_jax.ops.rowwise import rms_norm
from pallas_kernels.activations import summed
from pallas_kernels.decode_combine import DecodedParts, combined
from sharding.collectives import size_of


@dataclass(frozen=True, slots=True)
class Added:
    """Rows of the residual stream and what a product adds to them, for a norm to add up or to take in."""

    residual: Float32[Array, "T D"]
    parts: Float32[Array, "splits T D"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it makes."""
        return self.residual.shape


@dataclass(frozen=True, slots=True)
class Attended:
    """Attention of rows that decode, in parts, for a product to put together or to take in."""

    decoded: DecodedParts

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it makes."""
        T, N, H = self.decoded.out.shape
        return T, N * H


@dataclass(frozen=True, slots=True)
class Normed:
    """`rms_norm` of rows, for a product to compute or to take in."""

    x: Float32[Array, "T D"] | Added | Attended
    scales: Float[Array, "L D"]
    layer: Int32[Array, ""]  # whose scale
    eps: float

    @property
    def scale(self) -> Float[Array, " D"]:
        """The layer's."""
        return jax.lax.dynamic_index_in_dim(self.scales, self.layer, keepdims=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it makes."""
        return self.x.shape


def computed(x: Float[Array, "T K"] | Normed | Added | Attended, backend: Backend) -> Float[Array, "T K"]:
    """Rows for whoever needs them as an array."""
    if isinstance(x, Added):
        return x.residual + summed(x.parts)
    if isinstance(x, Attended):
        return combined(x.decoded, interpret=backend.kernels == "interpret").reshape(x.shape)
    return rms_norm(computed(x.x, backend), x.scale, x.eps, backend) if isinstance(x, Normed) else x


def norm_in_front(
    x: Float32[Array, "T D"] | Attended,
    scales: Float[Array, "L D"],
    layer: Int32[Array, ""],
    eps: float,
    backend: Backend,
    *,
    is_cut: bool,
) -> Float32[Array, "T D"] | Normed:
    """`rms_norm` by a layer's scale, left to the product that comes next where no device needs another for it."""
    norm = Normed(x, scales, layer, eps)
    if is_cut and size_of(backend.mesh, "tensor") > 1:
        return rms_norm(computed(x, backend), norm.scale, eps, backend, is_cut=True)
    return norm
