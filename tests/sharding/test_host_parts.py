"""Arrays that are filled part by part arrive as if they had been whole, and are held once."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from atoma_jax.loading.host_parts import HostParts
from sharding.mesh import MeshShape

SHAPE = (2, 2, 12, 6)  # layers, experts, N, K
MESH = MeshShape(fsdp=2, tensor=2, expert=2)
SPECS = {
    "whole": None,
    "everywhere": PartitionSpec(),
    "rows": PartitionSpec(None, None, ("tensor", "fsdp"), None),
    "inputs": PartitionSpec(None, None, None, "tensor"),
    "experts": PartitionSpec(None, "expert", "fsdp", "tensor"),
}
ROWS: list[Any] = [slice(0, 5), np.asarray([11, 5, 9]), slice(6, 9), np.asarray([10])]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", SPECS)
def test_what_is_put_in_pieces_arrives_in_its_place(name: str, axis: int) -> None:
    spec = SPECS[name]
    place = None if spec is None else NamedSharding(MESH.build(jax.devices()), spec)
    rng = np.random.default_rng(0)
    shape = SHAPE if axis == 0 else (*SHAPE[:2], SHAPE[3], SHAPE[2])
    if axis == 1 and spec is not None and len(spec) == 4:  # the same cut of what lies transposed
        place = NamedSharding(MESH.build(jax.devices()), PartitionSpec(spec[0], spec[1], spec[3], spec[2]))
    want = rng.normal(size=shape).astype(np.float32)
    array = HostParts(shape, np.float32, 2, place)
    array.clear()
    for block, matrix in enumerate(want.reshape(4, *shape[2:])):
        for rows in ROWS:
            array.put(block, rows, matrix[rows] if axis == 0 else matrix[:, rows], axis=axis)
    held = sum(part.memory.nbytes for part in array._parts)
    assert held == want.nbytes, "each number once, however many devices have it"
    got = array.on_devices()
    np.testing.assert_array_equal(got, want)
    if place is not None:
        assert got.sharding == place


def test_rows_that_nobody_puts_are_zeros() -> None:
    place = NamedSharding(MESH.build(jax.devices()), PartitionSpec(("tensor", "fsdp")))
    array = HostParts((8, 3), np.float16, 0, place)
    array.clear()
    array.put(0, slice(0, 5), np.ones((5, 3), np.float32))
    got = array.on_devices()
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, [[1] * 3] * 5 + [[0] * 3] * 3)


class _Elsewhere:
    """A sharding of which this process has rows 6 to 8 of the second expert alone."""

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[Any, Any]:
        assert shape == SHAPE
        return {"here": (slice(None), slice(1, 2), slice(6, 9), slice(None))}


@pytest.mark.parametrize("rows", [slice(0, 6), slice(9, 12), np.asarray([11, 10])])
def test_rows_of_other_processes_are_not_wanted(rows: Any) -> None:
    array = HostParts(SHAPE, np.float32, 2, _Elsewhere())
    assert not any(array.wants(block, rows) for block in range(4))
    assert [array.wants(block, slice(0, 7)) for block in range(4)] == [False, True, False, True]
    assert array.wants(3, np.asarray([2, 8]))
    assert HostParts(SHAPE, np.float32, 2, None).wants(0, rows)
