"""Rules from logical axes to a mesh, and arrays cut by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sharding.apply import cut, shard_shape, shardings
from sharding.errors import ShardingError
from sharding.mesh import MeshShape
from sharding.plan import allocated_bytes, bytes_per_device
from sharding.rules import FSDP, FSDP_TENSOR, PRESETS, TENSOR, partition, preset_of

MESH = MeshShape(fsdp=2, tensor=4)


def test_an_axis_goes_where_the_table_says() -> None:
    assert partition(("layer", "heads_out", "embed"), FSDP_TENSOR) == PartitionSpec(None, ("tensor", "fsdp"), None)
    assert partition(("layer", "embed_out", "heads"), FSDP_TENSOR) == PartitionSpec(None, "fsdp", "tensor")


def test_presets_leave_the_other_axes_of_a_mesh_alone() -> None:
    assert partition(("heads_out", "embed"), TENSOR) == PartitionSpec("tensor", None)
    assert partition(("heads_out", "embed"), FSDP) == PartitionSpec("fsdp", None)
    assert [preset_of(MeshShape(**{axis: 2})) for axis in ("data", "tensor", "fsdp")] == ["tensor", "tensor", "fsdp"]
    assert preset_of(MESH) == "fsdp_tensor"
    assert set(PRESETS) == {"tensor", "fsdp", "fsdp_tensor"}


def test_two_axes_of_one_array_on_one_axis_of_the_mesh_are_refused() -> None:
    with pytest.raises(ShardingError, match="both heads_out and ffn of one array lie on the mesh axis tensor"):
        partition(("heads_out", "ffn"), FSDP_TENSOR)


def test_an_axis_that_no_rule_names_is_refused() -> None:
    with pytest.raises(ShardingError, match="axis: is in no rule"):
        partition(("width",), FSDP_TENSOR)


def test_what_does_not_divide_is_refused_with_the_sizes_that_do() -> None:
    with pytest.raises(ShardingError, match=r"qkv: heads_out = 36 does not divide.*tensor=4 × fsdp=2.*4, 6, 9, 12"):
        cut("layers.qkv", (2, 36, 8), ("layer", "heads_out", "embed"), FSDP_TENSOR, MESH)


def test_bytes_of_a_device_are_what_is_allocated() -> None:
    arrays = {"a": jnp.zeros((2, 16, 3), jnp.float32), "b": jnp.zeros((5,), jnp.int8)}
    specs = {
        "a": cut("a", (2, 16, 3), ("layer", "heads_out", "embed"), FSDP_TENSOR, MESH),
        "b": cut("b", (5,), ("embed",), FSDP_TENSOR, MESH),
    }
    assert shard_shape((2, 16, 3), specs["a"], MESH) == (2, 2, 3)
    placed = jax.device_put(arrays, shardings(specs, MESH.build(jax.devices())))
    held = allocated_bytes(placed)
    assert set(held.values()) == {bytes_per_device(arrays, specs, MESH)} == {2 * 2 * 3 * 4 + 5}
    assert len(held) == 8
    # Parts that are gathered along fsdp make up a part of tensor without a gap.
    numbers = jax.device_put(np.arange(16), shardings(partition(("vocab",), FSDP_TENSOR), MESH.build(jax.devices())))
    of_device = {shard.device.id: shard.data[0].item() for shard in numbers.addressable_shards}
    assert [of_device[device] for device in (0, 4, 1, 5)] == [0, 2, 4, 6]
