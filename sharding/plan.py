"""Bytes that one device holds of a tree of arrays, from shapes alone. All devices of a mesh hold equally many."""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from sharding.apply import shard_shape
from sharding.mesh import MeshShape


def bytes_per_device(abstract: Any, specs: Any, shape: MeshShape) -> int:
    """Of all arrays of a tree together.

    Args:
        abstract: arrays, or `ShapeDtypeStruct`s for them.
        specs: a tree of the same structure that says where each is cut.
        shape: of the mesh.
    """
    leaves = jax.tree.leaves(abstract)
    cuts = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    return sum(array_bytes(leaf, spec, shape) for leaf, spec in zip(leaves, cuts, strict=True))


def array_bytes(array: Any, spec: PartitionSpec, shape: MeshShape) -> int:
    """Of one array."""
    size = array.dtype.itemsize
    for length in shard_shape(array.shape, spec, shape):
        size *= length
    return size


def allocated_bytes(tree: Any) -> dict[int, int]:
    """Bytes that arrays hold on each device of this process, by the device's id."""
    held: dict[int, int] = {}
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return held
