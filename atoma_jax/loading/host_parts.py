"""An array of a weight on its way to devices: on the host it lies in the parts that they want, each once.

A part is filled row by row as tensors are decoded, in memory that a CPU's device takes over. So a weight that is cut
over devices is never whole, neither on one of them nor on the host. Owns the parts; what is put into them is decoded
and packed by `weights.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import numpy as np

from atoma_jax.loading.checkpoint import Rows
from atoma_jax.loading.host_memory import aligned

_Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
_Bounds: TypeAlias = tuple[tuple[int, int], ...]  # start and stop on each axis


@dataclass(frozen=True, slots=True)
class _Part:
    bounds: _Bounds
    memory: _Array
    devices: list[Any] = field(default_factory=lambda: list[Any]())  # that hold it, several where it is repeated


class HostParts:
    """One array, its leading axes (layers, experts) counted as blocks."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, lead: int, place: Any):
        """Allocates; holds no values yet.

        Args:
            shape: of the whole array.
            dtype: of the array; values that are put become it.
            lead: how many axes count as blocks.
            place: its sharding; None: one part, for this process's first device.
        """
        self._shape, self._lead, self._place = shape, lead, place
        self._parts = [
            _Part(bounds, aligned(tuple(stop - start for start, stop in bounds), np.dtype(dtype)), devices)
            for bounds, devices in _bounds(shape, place).items()
        ]

    @property
    def whole(self) -> _Array:
        """All blocks of an array that is not cut."""
        assert self._place is None
        own = self._shape[self._lead :]
        return self._parts[0].memory.reshape(math.prod(self._shape[: self._lead]), *own)

    def clear(self) -> None:
        """Zeros everywhere."""
        for part in self._parts:
            part.memory[...] = 0

    def wants(self, block: int, rows: Rows) -> bool:
        """Whether any part holds some of these rows, along the first axis of a block: devices of other processes hold
        the rest. True of an array that is not cut, whose rows may lie in tiles."""
        if self._place is None:
            return True
        at = np.unravel_index(block, self._shape[: self._lead]) if self._lead else ()
        size = self._shape[self._lead]
        low, high = rows.indices(size)[:2] if isinstance(rows, slice) else (int(rows.min()), int(rows.max()) + 1)
        return any(
            all(first <= place < last for place, (first, last) in zip(at, part.bounds[: self._lead], strict=True))
            and low < part.bounds[self._lead][1]
            and high > part.bounds[self._lead][0]
            for part in self._parts
        )

    def put(self, block: int, rows: Rows, values: _Array, *, axis: int = 0) -> None:
        """Stores rows of one block, each in the parts that hold some of it.

        Args:
            block: which.
            rows: of the block, along `axis`.
            values: whole along all other axes.
            axis: of a block's own.
        """
        at = np.unravel_index(block, self._shape[: self._lead]) if self._lead else ()
        for part in self._parts:
            lead, own = part.bounds[: self._lead], part.bounds[self._lead :]
            if not all(start <= place < stop for place, (start, stop) in zip(at, lead, strict=True)):
                continue
            start, stop = own[axis]
            to, which = _inside(rows, start, stop, self._shape[self._lead + axis])
            source = tuple(which if number == axis else slice(*bound) for number, bound in enumerate(own))
            target = tuple(to if number == axis else slice(None) for number in range(len(own)))
            place = tuple(int(index) - low for index, (low, _) in zip(at, lead, strict=True))
            part.memory[place][target] = values[source]

    def on_devices(self) -> jax.Array:
        """The array on its devices, which may take the host's memory over."""
        if self._place is None:
            return jax.device_put(self._parts[0].memory)
        shards = [jax.device_put(part.memory, device) for part in self._parts for device in part.devices]
        return jax.make_array_from_single_device_arrays(self._shape, self._place, shards)


def _bounds(shape: tuple[int, ...], place: Any) -> dict[_Bounds, list[Any]]:
    """The parts of an array that devices of this process hold, and which do."""
    if place is None:
        return {tuple((0, length) for length in shape): []}
    regions: Mapping[Any, Any] = place.addressable_devices_indices_map(shape)
    found: dict[_Bounds, list[Any]] = {}
    for device, index in regions.items():
        bounds = tuple(
            (start, stop) for start, stop, _ in (one.indices(size) for one, size in zip(index, shape, strict=True))
        )
        found.setdefault(bounds, []).append(device)
    return found


def _inside(rows: Rows, start: int, stop: int, size: int) -> tuple[Rows, Rows]:
    """Where those of `rows` that lie between two bounds go in the part, and which of them they are."""
    if isinstance(rows, slice):
        first, last, _ = rows.indices(size)
        low, high = max(first, start), max(min(last, stop), max(first, start))
        return slice(low - start, high - start), slice(low - first, high - first)
    if start == 0 and stop == size:
        return rows, slice(None)
    which = np.flatnonzero((rows >= start) & (rows < stop))
    return rows[which] - start, which
