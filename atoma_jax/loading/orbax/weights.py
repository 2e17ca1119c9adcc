"""Weights as an Orbax checkpoint: written from a device, restored straight onto devices. Owns how Orbax is used.

Arrays are stored uncompressed, in chunks that a shard can be read by: quantized codes hardly shrink, and inflating them
takes several times as long as reading them. Orbax writes; its own storage library, TensorStore, reads: from mapped
files into memory that the device takes over, which copies every byte once, and without importing Orbax, which takes a
second. Whoever calls this knows shapes and types, and holds the files to them.
"""

import math
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import numpy as np

from atoma_jax.errors import UserError, WeightFileError
from atoma_jax.loading.host_memory import aligned
from atoma_jax.quant.qtensor import LayerVariants, QTensor

if TYPE_CHECKING:
    import tensorstore

CHUNK_BYTES = 8 << 20  # of a stored array: what one thread reads at once
FILE_BYTES = 64 << 20  # of a file, about: checksums are one thread's work a file
CHILDREN = (  # arrays of a `QTensor`
    "codes",
    "scales",
    "mins",
    "scale_supers",
    "min_supers",
    "permutation",
)

Weight: TypeAlias = jax.Array | QTensor | LayerVariants
# Of a weight's path and the field of its `QTensor`, None for a dense one. Stacks of layers are sharded alike.
ShardingOf: TypeAlias = Callable[[str, str | None], jax.sharding.Sharding]

_IN_FLIGHT = 1 << 30  # bytes on the host that are not on a device yet; more where one shard is larger
_READ = 1 << 18  # bytes of a file that are summed at once: they stay in a core's cache


def save(folder: Path, weights: Mapping[str, Weight]) -> None:
    """Writes every weight; `folder` must not exist.

    Raises:
        UserError: the disk is full, or the folder cannot be written for another reason.
    """
    import orbax.checkpoint as ocp  # a second that nobody else waits for

    tree = {array.name: array.value for path, weight in weights.items() for array in _arrays(path, weight)}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)
    arguments = ocp.args.PyTreeSave(
        tree,
        save_args={name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in tree},
        ocdbt_target_data_file_size=FILE_BYTES,
    )
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            checkpointer.save(folder.absolute(), args=arguments)
        except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
            raise UserError("out", _reason(error), f"{folder} cannot be written; choose another place") from error


def restore(
    folder: Path,
    planned: Mapping[str, Any],
    sharding_of: ShardingOf,
    *,
    threads: int,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> dict[str, Weight]:
    """Reads every weight onto the devices that `sharding_of` names.

    Args:
        folder: that `save` wrote.
        planned: the weights with `ShapeDtypeStruct`s for arrays; what is stored must be what they say.
        sharding_of: as in `ShardingOf`.
        threads: that copy at once.
        on_bytes: called with the bytes of each shard that has arrived.

    Raises:
        WeightFileError: an array is missing, misshapen or cannot be read.
    """
    named = {path: _arrays(path, weight) for path, weight in planned.items()}
    wanted = {
        array.name: jax.ShapeDtypeStruct(array.value.shape, array.value.dtype, sharding=sharding_of(path, array.child))
        for path, arrays in named.items()
        for array in arrays
    }
    stores = _stores(folder, wanted, threads)
    with _unreadable(folder):
        values = _read(stores, wanted, on_bytes)
    return {
        path: jax.tree.unflatten(jax.tree.structure(planned[path]), [values[array.name] for array in arrays])
        for path, arrays in named.items()
    }


def sums_of(weights: Mapping[str, Weight]) -> dict[str, int]:
    """The CRC-32 of every array's bytes by its name in a checkpoint, one array's copy on the host at a time."""
    return {
        array.name: zlib.crc32(np.ascontiguousarray(array.value).reshape(-1).view(np.uint8).data)
        for path, weight in weights.items()
        for array in _arrays(path, weight)
    }


def checksums(folder: Path, names: list[str], pool: ThreadPoolExecutor) -> dict[str, Future[int]]:
    """The CRC-32 of some files below `folder`, to come. Results raise WeightFileError where a file cannot be read."""
    return {name: pool.submit(_crc32, folder / name) for name in names}


def _crc32(path: Path) -> int:
    value, buffer = 0, memoryview(bytearray(_READ))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                value = zlib.crc32(buffer[:count], value)
    except OSError as error:
        raise WeightFileError(str(path), error.strerror, "must be a readable file") from error
    return value


class _Array(NamedTuple):
    """One array of a weight. `value` is `Any`: with values or without."""

    name: str
    child: str | None
    value: Any


def _arrays(path: str, weight: Any) -> list[_Array]:
    """The arrays of a weight in the order of its leaves, under the names that they are stored by."""
    arrays: list[_Array] = []
    for keys, value in jax.tree_util.tree_leaves_with_path(weight):
        parts = [key.name if isinstance(key, jax.tree_util.GetAttrKey) else str(key.idx) for key in keys]
        child = parts[-1] if parts and parts[-1] in CHILDREN else None
        arrays.append(_Array(".".join([path, *parts]), child, value))
    return arrays


def _stores(
    folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], threads: int
) -> "dict[str, tensorstore.TensorStore]":
    """The stored arrays, opened and found to be those that are wanted. None of their values is read."""
    import tensorstore

    context = tensorstore.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},  # nothing is read twice
            "file_io_mode": {"mode": "memmap"},
            "file_io_concurrency": {"limit": threads},
            "data_copy_concurrency": {"limit": threads},
        }
    )
    place = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/"}
    with _unreadable(folder):
        keys = tensorstore.KvStore.open(place, context=context).result().list().result()
    there = {key.decode(errors="replace").partition("/")[0] for key in keys}
    missing, spare = sorted(set(wanted) - there), sorted(there - set(wanted))
    if missing:
        array = wanted[missing[0]]
        problem = f"must be an array {array.shape} of {array.dtype}"
        raise WeightFileError(f"{folder}: array {missing[0]!r}", None, problem)
    if spare:
        raise WeightFileError(f"{folder}: arrays", spare[:3], "are in no weight of the model that model.json describes")
    opening = {
        name: tensorstore.open(
            {"driver": "zarr3", "kvstore": {**place, "path": f"{name}/"}, "fill_missing_data_reads": False},
            context=context,
            open=True,
            read=True,
        )
        for name in wanted
    }
    with _unreadable(folder):
        stores = {name: store.result() for name, store in opening.items()}
    for name, array in wanted.items():
        _check_stored(f"{folder}: array {name!r}", stores[name], array)
    return stores


def _check_stored(field: str, stored: "tensorstore.TensorStore", wanted: jax.ShapeDtypeStruct) -> None:
    """TensorStore would cast types and say nothing, and allocates what a chunk promises."""
    found = stored.shape, stored.dtype.numpy_dtype
    if found != (wanted.shape, wanted.dtype):
        raise WeightFileError(field, found, f"must be an array {wanted.shape} of {wanted.dtype}")
    layout = stored.chunk_layout
    for chunk in (layout.write_chunk_template.shape, layout.read_chunk_template.shape):
        if math.prod(chunk) > wanted.size:
            raise WeightFileError(f"{field} chunks", chunk, f"must be no larger than the array, {wanted.shape}")


def _read(
    stores: "Mapping[str, tensorstore.TensorStore]",
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    on_bytes: Callable[[int], None],
) -> dict[str, jax.Array]:
    """Every array on its devices. What several devices hold alike is read once."""
    import tensorstore

    shards: dict[str, list[jax.Array]] = {name: [] for name in wanted}
    reading: deque[tuple[str, list[Any], np.ndarray[Any, Any], tensorstore.WriteFutures]] = deque()
    in_flight = 0

    def finish() -> int:
        name, devices, buffer, written = reading.popleft()
        written.result()
        # Waited for: until then the host's memory is in use.
        shards[name] += jax.block_until_ready([jax.device_put(buffer, device) for device in devices])
        on_bytes(buffer.nbytes)
        return buffer.nbytes

    for name, array in wanted.items():
        for index, devices in _places(array).items():
            region = tuple(slice(start, stop) for start, stop in index)
            buffer = aligned(tuple(stop - start for start, stop in index), array.dtype)
            while reading and in_flight + buffer.nbytes > _IN_FLIGHT:
                in_flight -= finish()
            source = stores[name][region][tensorstore.d[:].translate_to[0]]
            reading.append((name, devices, buffer, tensorstore.array(buffer).write(source)))
            in_flight += buffer.nbytes
    while reading:
        finish()
    return {
        name: jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards[name])
        for name, array in wanted.items()
    }


def _places(array: jax.ShapeDtypeStruct) -> dict[tuple[tuple[int, int], ...], list[Any]]:
    """The devices of this process by the region of the array, start and stop on each axis, that they hold."""
    places: dict[tuple[tuple[int, int], ...], list[Any]] = defaultdict(list)
    regions: Mapping[Any, Any] = array.sharding.addressable_devices_indices_map(array.shape)
    for device, index in regions.items():
        bounds = (part.indices(length) for part, length in zip(index, array.shape, strict=True))
        places[tuple((start, stop) for start, stop, _ in bounds)].append(device)
    return places


@contextmanager
def _unreadable(folder: Path) -> Generator[None]:
    """Makes a WeightFileError of whatever TensorStore raises, which is not one class."""
    try:
        yield
    except Exception as error:
        problem = "cannot be restored: damaged; convert the model again"
        raise WeightFileError(f"{folder}: weights", _reason(error), problem) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
