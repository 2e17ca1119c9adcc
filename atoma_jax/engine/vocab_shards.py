"""A vocabulary whose parts lie on several devices: what the sampler asks of all parts together.

Devices exchange one number a row, or the likeliest few of each part, never logits of all tokens. Sums are of integers,
so that they do not depend on how the vocabulary is cut. Where it is not cut, every function is the identity.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, Shaped

from sharding.collectives import max_over, part_index, size_of, stack_over, sum_over
from sharding.mesh import MeshShape


@dataclass(frozen=True, slots=True)
class VocabShards:
    """How a vocabulary is cut over the axis `tensor` of a mesh; a mesh of None: not at all."""

    mesh: MeshShape | None = None

    @property
    def count(self) -> int:
        """Parts."""
        return size_of(self.mesh, "tensor")

    def size(self, part: int) -> int:
        """Tokens of the whole vocabulary, given those of a part."""
        return part * self.count

    def first(self, part: int) -> Int32[Array, ""] | int:
        """Id of the first token of this device's part."""
        return part_index(self.mesh, "tensor") * part

    def own(self, ids: Int32[Array, "*n"], part: int) -> tuple[Int32[Array, "*n"], Bool[Array, "*n"]]:
        """Ids as places of this device's part, and which are in there; the others become `part`, past its end."""
        places = ids - self.first(part)
        there = (places >= 0) & (places < part)
        return jnp.where(there, places, part), there

    def total(self, x: Shaped[Array, "*n"]) -> Shaped[Array, "*n"]:
        """The sum over all parts."""
        return sum_over(x, self.mesh, "tensor")

    def largest(self, x: Shaped[Array, "*n"]) -> Shaped[Array, "*n"]:
        """The largest over all parts."""
        return max_over(x, self.mesh, "tensor")

    def stacked(self, x: Shaped[Array, "*n"]) -> Shaped[Array, "parts *n"]:
        """What every part has, in order."""
        return stack_over(x, self.mesh, "tensor")

    def merged_top(
        self, values: Float32[Array, "B m"], ids: Int32[Array, "B m"], n: int
    ) -> tuple[Float32[Array, "B n"], Int32[Array, "B n"]]:
        """The n largest of each row and their ids, of each part's m largest in descending order."""
        if self.count == 1:
            return values[:, :n], ids[:, :n]
        parts = self.stacked(jnp.stack([lax.bitcast_convert_type(values, jnp.int32), ids]))  # [parts, 2, B, m]
        every = parts.transpose(1, 2, 0, 3).reshape(2, values.shape[0], -1)
        # Parts are in the order of ids: of equal values top_k takes the lower id first.
        top, places = lax.top_k(lax.bitcast_convert_type(every[0], jnp.float32), n)
        return top, jnp.take_along_axis(every[1], places, axis=1, mode="clip")


WHOLE = VocabShards()
