"""What devices of a mesh say to each other inside of a step. Every function is the identity where there is one device.

A step runs under `shard_map`: code sees the part of each array that its device has, and these calls are all the
communication there is. `mesh` is None where no mesh was asked for: programs are then what they would be without calls.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, Shaped

from sharding.mesh import AXES, MeshShape


def size_of(mesh: MeshShape | None, *axes: str) -> int:
    """Devices along some axes together."""
    size = 1
    for axis in axes:
        assert axis in AXES, axis
        size *= 1 if mesh is None else mesh.sizes[axis]
    return size


def _crossed(mesh: MeshShape | None, axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if size_of(mesh, axis) > 1)


def part_index(mesh: MeshShape | None, *axes: str) -> Int32[Array, ""] | int:
    """Which part this device has of something that is cut over some axes, the first axis the slowest."""
    index: Array | int = 0
    for axis in _crossed(mesh, axes):
        index = index * size_of(mesh, axis) + lax.axis_index(axis)
    return index


def sum_over(x: Shaped[Array, "*n"], mesh: MeshShape | None, *axes: str) -> Shaped[Array, "*n"]:
    """The sum over all devices along some axes."""
    crossed = _crossed(mesh, axes)
    return lax.psum(x, crossed) if crossed else x


def mean_over(x: Shaped[Array, "*n"], mesh: MeshShape | None, *axes: str) -> Shaped[Array, "*n"]:
    """The mean over all devices along some axes."""
    crossed = _crossed(mesh, axes)
    return lax.pmean(x, crossed) if crossed else x


def max_over(x: Shaped[Array, "*n"], mesh: MeshShape | None, *axes: str) -> Shaped[Array, "*n"]:
    """The largest over all devices along some axes; NaN where one is."""
    crossed = _crossed(mesh, axes)
    if not crossed:
        return x
    parts = lax.all_gather(x, crossed)
    largest = jnp.max(parts, axis=0)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return largest
    # XLA:CPU's maximum may pass over a NaN.
    return jnp.where(jnp.any(jnp.isnan(parts), axis=0), jnp.nan, largest)


def stack_over(x: Shaped[Array, "*n"], mesh: MeshShape | None, axis: str) -> Shaped[Array, "parts *n"]:
    """What each device along an axis has, in their order."""
    return lax.all_gather(x, axis) if size_of(mesh, axis) > 1 else x[None]


def join_over(x: Shaped[Array, "*n"], mesh: MeshShape | None, axis: str, dim: int) -> Shaped[Array, "*m"]:
    """The parts of an array that is cut along a dimension, joined."""
    if size_of(mesh, axis) == 1:
        return x
    if dim == 0:
        return lax.all_gather(x, axis, tiled=True)
    # Devices send what lies together. Joined along another dimension than the first, XLA would lay `x` out anew for
    # that, and with it the whole stack of layers that it is one of; so only what has come is put in order.
    parts = jnp.moveaxis(lax.all_gather(x, axis), 0, dim)
    return parts.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])


def sum_and_cut(x: Shaped[Array, "*n"], mesh: MeshShape | None, axis: str, dim: int) -> Shaped[Array, "*m"]:
    """The sum over an axis, of which each device keeps its part of a dimension."""
    return lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True) if size_of(mesh, axis) > 1 else x


def pass_on(x: Shaped[Array, "*n"], mesh: MeshShape | None, *axes: str) -> Shaped[Array, "*n"]:
    """What the device before this one has, of those along some axes in the mesh's order; the first gets the last's."""
    assert list(axes) == sorted(axes, key=AXES.index), "JAX counts devices in the mesh's order, whatever it is told"
    crossed, parts = _crossed(mesh, axes), size_of(mesh, *axes)
    return lax.ppermute(x, crossed, [(part, (part + 1) % parts) for part in range(parts)]) if crossed else x


def swap_cut(x: Shaped[Array, "*n"], mesh: MeshShape | None, axis: str, *, cut: int, join: int) -> Shaped[Array, "*m"]:
    """Cuts a dimension over an axis and joins another that was."""
    if size_of(mesh, axis) == 1:
        return x
    return lax.all_to_all(x, axis, split_axis=cut, concat_axis=join, tiled=True)
