"""Meshes: what their text means, what is refused, which devices are neighbours."""

from pathlib import Path

import jax
import pytest

from atoma_jax.engine.mesh_config import planned_mesh, read_mesh, resolved_mesh
from atoma_jax.errors import ConfigError
from sharding.errors import ShardingError
from sharding.mesh import AXES, MeshShape, parse_mesh


class TestText:
    def test_sizes_are_read_in_any_order(self) -> None:
        assert parse_mesh("tensor=4, data=1,fsdp = 2") == MeshShape(fsdp=2, tensor=4)

    def test_a_shape_is_written_without_axes_of_one_device(self) -> None:
        shape = MeshShape(fsdp=2, tensor=4)
        assert shape.text == "fsdp=2,tensor=4"
        assert parse_mesh(shape.text) == shape
        assert parse_mesh(MeshShape().text) == MeshShape()

    @pytest.mark.parametrize(
        ("text", "field", "says"),
        [
            ("tensor", "mesh", "must be like fsdp=2,tensor=4"),
            ("tensor=2,tensor=4", "mesh", "names tensor twice"),
            ("heads=2", "mesh.heads", "there are data, fsdp, tensor, expert"),
            ("tensor=0", "mesh.tensor", "must be between 1 and 4096, or -1"),
            ("tensor=-2", "mesh.tensor", "must be between 1 and 4096, or -1"),
            ("tensor=5000", "mesh.tensor", "must be between 1 and 4096, or -1"),
            ("tensor=1.5", "mesh", "must be like fsdp=2,tensor=4"),
            ("tensor=-1,fsdp=-1", "mesh", "only one axis may be -1"),
        ],
    )
    def test_what_is_none_is_refused_by_name(self, text: str, field: str, says: str) -> None:
        with pytest.raises(ShardingError, match=says) as caught:
            parse_mesh(text)
        assert caught.value.field == field


class TestResolving:
    def test_one_axis_takes_what_is_left(self) -> None:
        assert parse_mesh("data=2,tensor=-1").resolved(8) == MeshShape(data=2, tensor=4)

    def test_devices_may_be_left_over_where_all_sizes_are_given(self) -> None:
        assert MeshShape(tensor=2).resolved(8).num_devices == 2

    @pytest.mark.parametrize(
        ("text", "says"),
        [("tensor=9", "needs 9 devices and there are 8"), ("data=3,tensor=-1", "leaves 8 / 3 devices")],
    )
    def test_what_does_not_fit_is_refused(self, text: str, says: str) -> None:
        with pytest.raises(ShardingError, match=says):
            parse_mesh(text).resolved(8)

    def test_neighbours_are_along_tensor_and_slices_are_data_then_fsdp(self) -> None:
        mesh = MeshShape(data=2, fsdp=2, tensor=2).build(jax.devices())
        assert mesh.axis_names == AXES
        assert [device.id for device in mesh.devices.reshape(-1)] == list(range(8))
        assert [device.id for device in MeshShape(expert=2, tensor=2).build(jax.devices()).devices[0, 0, :, 0]] == [
            0,
            1,
        ]


class TestSetting:
    def test_a_mesh_of_one_device_is_none(self) -> None:
        assert resolved_mesh(None, 8) is None
        assert resolved_mesh("data=1", 8) is None
        assert planned_mesh("tensor=1") is None

    def test_shipped_presets_take_all_devices(self) -> None:
        assert resolved_mesh("tensor", 4) == MeshShape(tensor=4)
        assert resolved_mesh("fsdp", 8) == MeshShape(fsdp=8)
        assert resolved_mesh("data", 2) == MeshShape(data=2)

    def test_a_plan_needs_no_devices(self) -> None:
        assert planned_mesh("fsdp=64,tensor=8") == MeshShape(fsdp=64, tensor=8)

    def test_a_file_says_the_same_as_text(self, tmp_path: Path) -> None:
        path = tmp_path / "mesh.toml"
        path.write_text("fsdp = 2\ntensor = -1\n")
        assert read_mesh(str(path)) == MeshShape(fsdp=2, tensor=-1)

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("heads = 2", "is no axis"),
            ("tensor = 'two'", "must be an integer"),
            ("tensor = true", "must be an integer"),
            ("tensor =", "is no valid TOML"),
        ],
    )
    def test_a_file_that_is_wrong_is_refused(self, tmp_path: Path, content: str, says: str) -> None:
        path = tmp_path / "mesh.toml"
        path.write_text(content)
        with pytest.raises(ConfigError, match=says):
            read_mesh(str(path))

    @pytest.mark.parametrize("text", ["tensors", "missing.toml"])
    def test_what_is_not_there_is_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match="mesh: "):
            read_mesh(text)
