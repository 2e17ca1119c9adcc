"""What a device of a mesh does before and after the products of its part of a weight.

Owns the gathering of weights that `fsdp` spreads, and what is different where inputs, experts or a vocabulary are cut.
The products themselves are not here. All of this runs under `shard_map`; with a mesh of None nothing happens.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from atoma_jax.ops.residual import sum_of_parts
from atoma_jax.quant.cuts import SIDES, part_of, sides_of
from atoma_jax.quant.qtensor import QTensor
from pallas_kernels.grouped_matmul import ExpertBlocks
from pallas_kernels.quantized_matmul import quantize_tokens
from sharding.collectives import join_over, max_over, part_index, sum_and_cut
from sharding.mesh import MeshShape


def gathered(weight: QTensor | Array, mesh: MeshShape | None) -> QTensor | Array:
    """A weight whole along `fsdp`, which cuts out-features alone."""
    if not isinstance(weight, QTensor):
        return join_over(weight, mesh, "fsdp", weight.ndim - 2)

    def joined(child: str) -> Array:
        array, sides = getattr(weight, child), sides_of(weight, child)
        if "N" not in sides:
            return array
        return join_over(array, mesh, "fsdp", array.ndim - len(sides) + sides.index("N"))

    there = [child for child in SIDES[weight.layout] if getattr(weight, child) is not None]
    return part_of(replace(weight, **{child: joined(child) for child in there}))


def stacked(weight: QTensor | Array) -> QTensor | Array:
    """A weight of one layer as a stack of one."""
    return jax.tree.map(lambda leaf: leaf[None], weight)


def quantized_parts(
    x: Float[Array, "T K"], mesh: MeshShape | None
) -> tuple[Float32[Array, "T K"], Float32[Array, "T 1"]]:
    """Tokens whose inputs are cut over `tensor` as int8 codes, and the factors that products are multiplied by: a
    token has one, from the largest of all its inputs."""
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)
    codes, factor = quantize_tokens(x, max_over(largest, mesh, "tensor"))
    return codes.astype(jnp.float32), factor


def inputs_of(x: Float[Array, "T K"], weight: QTensor | Array, mesh: MeshShape | None) -> Float[Array, "T M"]:
    """What a part of a weight multiplies: its own inputs, or those of all parts where it picks them by number."""
    if isinstance(weight, QTensor) and weight.permutation is not None:
        return join_over(x, mesh, "tensor", 1)
    return x


def own_experts(
    experts: Int32[Array, "T k"], weights: Float32[Array, "T k"], count: int, mesh: MeshShape | None
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
    """Choices as numbers of this device's `count` experts. Those of others become expert `count` and weigh nothing."""
    own = experts - part_index(mesh, "expert") * count
    mine = (own >= 0) & (own < count)
    return jnp.where(mine, own, count), jnp.where(mine, weights, 0.0)


def without_last(blocks: ExpertBlocks, last: int) -> ExpertBlocks:
    """The blocks without those of the last expert, which come after all others."""
    index = jnp.arange(blocks.expert.shape[0], dtype=jnp.int32)
    work = (index < blocks.used) & (blocks.expert < last)
    return blocks._replace(used=jnp.sum(work, dtype=jnp.int32))


def own_rows(ids: Int32[Array, " T"], table: QTensor | Array, mesh: MeshShape | None) -> Int32[Array, " slices"]:
    """Ids of all slices that share a table along `fsdp` as rows of this device's part; -1 for rows that others have."""
    V = table.shape[0]
    rows = join_over(ids, mesh, "fsdp", 0) - part_index(mesh, "tensor", "fsdp") * V
    return jnp.where((rows >= 0) & (rows < V), rows, -1)


def from_all_rows(rows: Float32[Array, "slices D"], mesh: MeshShape | None) -> Float32[Array, "t D"]:
    """This slice's rows, each of which one device has and all others hold as zeros: as the stream lies."""
    return sum_of_parts(sum_and_cut(rows, mesh, "fsdp", 0), mesh)
