"""Weights as an Orbax checkpoint: written from a device, restored straight onto devices. Owns how Orbax is used.

Arrays are stored uncompressed, in chunks that a shard can be read by: quantized codes hardly shrink, and inflating them
takes several times as long as reading them. Whoever calls this knows shapes and types, and holds the files to them.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax

from atoma_jax.errors import UserError, WeightFileError
from atoma_jax.quant.qtensor import LayerVariants, QTensor

CHUNK_BYTES = 8 << 20  # of a stored array: what one thread reads at once
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

_GIGABYTE = 10**9
_MOST_IN_FLIGHT = 4  # gigabytes read at once, beside what is restored already; more where one array is larger
_READ = 1 << 22  # bytes of a file that are summed at once


def save(folder: Path, weights: Mapping[str, Weight]) -> None:
    """Writes every weight; `folder` must not exist.

    Raises:
        UserError: the disk is full, or the folder cannot be written for another reason.
    """
    import orbax.checkpoint as ocp  # a second that nobody else waits for

    tree = {array.name: array.value for path, weight in weights.items() for array in _arrays(path, weight)}
    chunked = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in tree}
    with ocp.Checkpointer(_handler(tree)) as checkpointer:
        try:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree, save_args=chunked))
        except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
            raise UserError("out", _reason(error), f"{folder} cannot be written; choose another place") from error


def restore(folder: Path, planned: Mapping[str, Any], sharding_of: ShardingOf) -> dict[str, Weight]:
    """Reads every weight onto the devices that `sharding_of` names.

    Args:
        folder: that `save` wrote.
        planned: the weights with `ShapeDtypeStruct`s for arrays; what is stored must be what they say.
        sharding_of: as in `ShardingOf`.

    Raises:
        WeightFileError: an array is missing, misshapen or cannot be read.
    """
    import orbax.checkpoint as ocp

    named = {path: _arrays(path, weight) for path, weight in planned.items()}
    placed = {
        array.name: jax.ShapeDtypeStruct(array.value.shape, array.value.dtype, sharding=sharding_of(path, array.child))
        for path, arrays in named.items()
        for array in arrays
    }
    with ocp.Checkpointer(_handler(placed)) as checkpointer:
        _check_stored(folder, _stored(checkpointer, folder), placed)
        try:
            arguments = ocp.args.PyTreeRestore(
                item=placed, restore_args=ocp.checkpoint_utils.construct_restore_args(placed)
            )
            values: dict[str, Any] = checkpointer.restore(folder.absolute(), args=arguments)
        except Exception as error:  # what Orbax and TensorStore raise is not one class
            raise _unreadable(folder, error) from error
    return {
        path: jax.tree.unflatten(jax.tree.structure(planned[path]), [values[array.name] for array in arrays])
        for path, arrays in named.items()
    }


def checksums(folder: Path, names: list[str], threads: int) -> dict[str, int]:
    """The CRC-32 of some files below `folder`."""
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(names, pool.map(_crc32, (folder / name for name in names)), strict=True))


def _crc32(path: Path) -> int:
    value = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_READ):
                value = zlib.crc32(chunk, value)
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


def _handler(tree: Any) -> Any:
    """What reads and writes trees of arrays. `Any`: Orbax's own type is of no use here."""
    import orbax.checkpoint as ocp

    largest = max(array.size * array.dtype.itemsize for array in jax.tree.leaves(tree))
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=True,
        use_zarr3=True,
        use_compression=False,
        restore_concurrent_gb=max(_MOST_IN_FLIGHT, 1 + math.ceil(1.1 * largest / _GIGABYTE)),
    )


def _stored(checkpointer: Any, folder: Path) -> Any:
    """What Orbax says about the stored arrays, before any of them is read."""
    try:
        return checkpointer.metadata(folder.absolute()).item_metadata.tree
    except Exception as error:  # as in `restore`
        raise _unreadable(folder, error) from error


def _check_stored(folder: Path, stored: Any, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Orbax would cast types and say nothing, and would leave a failed read's threads behind."""
    there = stored if isinstance(stored, dict) else {}
    for name, array in wanted.items():
        field = f"{folder}: array {name!r}"
        found = getattr(there.get(name), "shape", None), getattr(there.get(name), "dtype", None)
        if found != (array.shape, array.dtype):
            raise WeightFileError(field, found, f"must be an array {array.shape} of {array.dtype}")
        chunk = getattr(getattr(there[name], "storage", None), "chunk_shape", None) or array.shape
        if math.prod(chunk) > array.size:
            raise WeightFileError(f"{field} chunks", chunk, f"must be no larger than the array, {array.shape}")
    spare = sorted(set(there) - set(wanted))
    if spare:
        raise WeightFileError(f"{folder}: arrays", spare[:3], "are in no weight of the model that model.json describes")


def _unreadable(folder: Path, error: Exception) -> WeightFileError:
    return WeightFileError(f"{folder}: weights", _reason(error), "cannot be restored: damaged; convert the model again")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
