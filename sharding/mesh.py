"""The shape of a mesh: how many devices lie along each of its axes. Owns its spellings and its checks.

`data` repeats the model, `fsdp` spreads weights that are gathered before use, `tensor` splits heads, feed-forward nets
and vocabulary, `expert` spreads the experts of a mixture. Requests are split over `data` and `fsdp`: a slice.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import AxisType, Mesh

from sharding.errors import ShardingError

AXES = ("data", "fsdp", "tensor", "expert")
SLICES = ("data", "fsdp")  # axes that tokens, rows and pages are split over
INFERRED = -1
LARGEST = 4096  # devices along one axis


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshShape:
    """Devices along each axis; −1 stands for as many as are left."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for name, size in self.sizes.items():
            if size != INFERRED and not 1 <= size <= LARGEST:
                raise ShardingError(f"mesh.{name}", size, f"must be between 1 and {LARGEST}, or -1 for what is left")
        inferred = [name for name, size in self.sizes.items() if size == INFERRED]
        if len(inferred) > 1:
            raise ShardingError("mesh", ", ".join(inferred), "only one axis may be -1: give sizes to the others")

    @property
    def sizes(self) -> dict[str, int]:
        """By axis, in the order of `AXES`."""
        return {name: getattr(self, name) for name in AXES}

    @property
    def num_devices(self) -> int:
        """Of all axes together; of a shape without −1."""
        return math.prod(self.sizes.values())

    @property
    def num_slices(self) -> int:
        """Groups of devices that serve requests of their own."""
        return self.data * self.fsdp

    @property
    def text(self) -> str:
        """As `--mesh` takes it, without the axes of one device."""
        return ",".join(f"{name}={size}" for name, size in self.sizes.items() if size != 1) or "data=1"

    def resolved(self, num_devices: int) -> "MeshShape":
        """The shape with what is inferred from a number of devices.

        Raises:
            ShardingError: there are not enough, or they do not divide.
        """
        known = math.prod(size for size in self.sizes.values() if size != INFERRED)
        if known > num_devices:
            problem = f"needs {known} devices and there are {num_devices}: make an axis smaller"
            raise ShardingError("mesh", self.text, problem)
        inferred = next((name for name, size in self.sizes.items() if size == INFERRED), None)
        if inferred is None:
            return self
        if num_devices % known:
            problem = f"leaves {num_devices} / {known} devices for {inferred}, no whole number: change another axis"
            raise ShardingError("mesh", self.text, problem)
        return dataclasses.replace(self, **{inferred: num_devices // known})

    def build(self, devices: Sequence[Any]) -> Mesh:
        """The mesh on the first devices. Neighbours are along `tensor`, whose collectives are the most frequent."""
        chosen = np.asarray(devices[: self.num_devices], dtype=object)
        assert chosen.size == self.num_devices, (chosen.size, self)
        # data, fsdp, expert, tensor from far to near; the axes' order in the mesh is that of AXES.
        grid = chosen.reshape(self.data, self.fsdp, self.expert, self.tensor).swapaxes(2, 3)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> MeshShape:
    """A shape as people write it: `data=1,fsdp=2,tensor=-1`.

    Raises:
        ShardingError: it is none.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-?\d{1,6})\s*", part)
        if match is None:
            raise ShardingError("mesh", text, f"must be like fsdp=2,tensor=4 with the axes {', '.join(AXES)}")
        if match[1] in sizes:
            raise ShardingError("mesh", text, f"names {match[1]} twice: leave one out")
        sizes[match[1]] = int(match[2])
    return mesh_of(sizes)


def mesh_of(sizes: Mapping[str, Any]) -> MeshShape:
    """A shape from a table, such as that of a TOML file.

    Raises:
        ShardingError: an axis is unknown, or a size is outside its limits.
    """
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise ShardingError(f"mesh.{unknown[0]}", sizes[unknown[0]], f"is no axis; there are {', '.join(AXES)}")
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise ShardingError(f"mesh.{name}", size, "must be an integer")
    return MeshShape(**sizes)
