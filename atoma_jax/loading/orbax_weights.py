"""Weights as an Orbax checkpoint: written from a device, restored straight onto devices. Owns how Orbax is used.

Arrays are stored uncompressed, in chunks that a shard can be read by: quantized codes hardly shrink, and inflating them
takes several times as long as reading them. Whoever calls this knows shapes and types, and holds the files to them.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import jax

from atoma_jax.errors import UserError, WeightFileError
from atoma_jax.loading.weight_forms import DenseForm, QuantizedForm
from atoma_jax.quant.qtensor import QTensor

CHUNK_BYTES = 8 << 20  # of a stored array: what one thread reads at once
CHILDREN = ("codes", "scales", "mins", "scale_supers", "min_supers", "permutation")  # arrays of a `QTensor`

Weights: TypeAlias = Mapping[str, jax.Array | QTensor]
ShardingOf: TypeAlias = Callable[[str, str | None], jax.sharding.Sharding]  # of a weight's path and a `QTensor`'s child

_GIGABYTE = 10**9
_MOST_IN_FLIGHT = 4  # gigabytes read at once, beside what is restored already; more where one array is larger
_READ = 1 << 22  # bytes of a file that are summed at once


def save(folder: Path, weights: Weights) -> None:
    """Writes every weight; `folder` must not exist.

    Raises:
        UserError: the disk is full, or the folder cannot be written for another reason.
    """
    import orbax.checkpoint as ocp  # a second that nobody else waits for

    tree = {path: _children(weight) for path, weight in weights.items()}
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with ocp.Checkpointer(_handler(tree)) as checkpointer:
        try:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree, save_args=chunked))
        except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
            raise UserError("out", _reason(error), f"{folder} cannot be written; choose another place") from error


def restore(
    folder: Path, forms: Mapping[str, DenseForm | QuantizedForm], sharding_of: ShardingOf
) -> dict[str, jax.Array | QTensor]:
    """Reads every weight onto the devices that `sharding_of` names; what is stored must be what `forms` say.

    Raises:
        WeightFileError: an array is missing, misshapen or cannot be read.
    """
    import orbax.checkpoint as ocp

    abstract = {path: _children(form.abstract()) for path, form in forms.items()}
    placed = {
        path: (
            {child: _placed(array, sharding_of(path, child)) for child, array in arrays.items()}
            if isinstance(arrays, dict)
            else _placed(arrays, sharding_of(path, None))
        )
        for path, arrays in abstract.items()
    }
    with ocp.Checkpointer(_handler(placed)) as checkpointer:
        _check_stored(folder, _stored(checkpointer, folder), abstract)
        try:
            arguments = ocp.args.PyTreeRestore(
                item=placed, restore_args=ocp.checkpoint_utils.construct_restore_args(placed)
            )
            arrays: dict[str, Any] = checkpointer.restore(folder.absolute(), args=arguments)
        except Exception as error:  # what Orbax and TensorStore raise is not one class
            raise _unreadable(folder, error) from error
    return {
        path: form.qtensor(arrays[path]) if isinstance(form, QuantizedForm) else arrays[path]
        for path, form in forms.items()
    }


def checksums(folder: Path, names: list[str], threads: int) -> dict[str, int]:
    """The CRC-32 of some files below `folder`."""
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(names, pool.map(_crc32, (folder / name for name in names)), strict=True))


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_READ):
            value = zlib.crc32(chunk, value)
    return value


def _children(weight: Any) -> Any:
    """A weight as Orbax sees it: an array, or a dict of arrays. `Any`: with values or without."""
    if not isinstance(weight, QTensor):
        return weight
    return {name: array for name in CHILDREN if (array := getattr(weight, name)) is not None}


def _placed(array: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


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


def _check_stored(folder: Path, stored: Any, wanted: Mapping[str, Any]) -> None:
    """Orbax would cast types and say nothing, and would leave a failed read's threads behind."""
    for path, arrays in wanted.items():
        for child, array in arrays.items() if isinstance(arrays, dict) else [(None, arrays)]:
            field = f"{folder}: weight {path if child is None else f'{path}.{child}'!r}"
            there = stored.get(path) if isinstance(stored, dict) else None
            if child is not None:
                there = there.get(child) if isinstance(there, dict) else None
            found = getattr(there, "shape", None), getattr(there, "dtype", None)
            if found != (array.shape, array.dtype):
                raise WeightFileError(field, found, f"must be an array {array.shape} of {array.dtype}")
            chunk = getattr(getattr(there, "storage", None), "chunk_shape", None) or array.shape
            if math.prod(chunk) > array.size:
                raise WeightFileError(f"{field} chunks", chunk, f"must be no larger than the array, {array.shape}")
    names = {path: set(arrays) if isinstance(arrays, dict) else None for path, arrays in wanted.items()}
    found = {path: set(arrays) if isinstance(arrays, dict) else None for path, arrays in dict(stored).items()}
    if found != names:
        spare = sorted(path for path in found if found[path] != names.get(path, ...))
        raise WeightFileError(f"{folder}: weights", spare[:3], "are no weights of the model that model.json describes")


def _unreadable(folder: Path, error: Exception) -> WeightFileError:
    return WeightFileError(f"{folder}: weights", _reason(error), "cannot be restored: damaged; convert the model again")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
