"""Rules and a mesh applied to arrays: where each is cut, what a device holds of it, and the shardings JAX wants.

Works on shapes: nothing here needs the devices to be there but `shardings`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.errors import ShardingError
from sharding.mesh import MeshShape
from sharding.rules import Rules, partition


def parts_of(spec: PartitionSpec, ndim: int, shape: MeshShape) -> tuple[int, ...]:
    """In how many parts each dimension of an array is cut."""
    entries = (*spec, *(None,) * (ndim - len(spec)))
    return tuple(
        math.prod(shape.sizes[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ()))
        for entry in entries
    )


def cut(name: str, dims: Sequence[int], axes: Sequence[str | None], rules: Rules, shape: MeshShape) -> PartitionSpec:
    """Where an array is cut, found to divide.

    Args:
        name: of the array, for errors.
        dims: its shape.
        axes: a logical axis for each dimension.
        rules: from logical axes to those of the mesh.
        shape: of the mesh.

    Raises:
        ShardingError: a dimension does not divide; it names the sizes that would.
    """
    spec = partition(axes, rules)
    for axis, size, parts in zip(axes, dims, parts_of(spec, len(dims), shape), strict=True):
        if size % parts:
            over = " × ".join(f"{mesh_axis}={shape.sizes[mesh_axis]}" for mesh_axis in rules[str(axis)])
            fitting = ", ".join(map(str, divisors(size)))
            problem = f"{axis} = {size} does not divide into the {parts} parts of {over}: possible are {fitting}"
            raise ShardingError(name, tuple(dims), problem)
    return spec


def divisors(size: int, most: int = 64) -> list[int]:
    """Numbers of parts, up to `most`, that a size divides into."""
    return [parts for parts in range(1, min(size, most) + 1) if size % parts == 0]


def shard_shape(dims: Sequence[int], spec: PartitionSpec, shape: MeshShape) -> tuple[int, ...]:
    """What one device holds of an array."""
    return tuple(size // parts for size, parts in zip(dims, parts_of(spec, len(dims), shape), strict=True))


def shardings(specs: Any, mesh: Mesh) -> Any:
    """A tree of `PartitionSpec`s as one of `NamedSharding`s."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: _is_spec(leaf))


def with_shardings(abstract: Any, specs: Any, mesh: Mesh) -> Any:
    """A tree of `ShapeDtypeStruct`s that say where they lie."""
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        abstract,
        specs,
    )


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
