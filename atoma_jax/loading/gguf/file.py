"""Opens GGUF files: maps them, puts shards together, and gives tensors as views of the mapping.

Owns files and shards. The header's format and its checks are `header.py`'s, checked access to metadata is
`metadata.py`'s, decoding is `quant/ggml.py`'s. Opening reads no byte of tensor data; nothing here imports JAX.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import UInt8

from atoma_jax.errors import ModelNotFoundError, WeightFileError
from atoma_jax.loading.checkpoint import Floats, Rows
from atoma_jax.loading.gguf.header import parse_header
from atoma_jax.loading.gguf.metadata import Metadata
from atoma_jax.loading.mapped import map_file
from atoma_jax.quant import ggml
from atoma_jax.quant.ggml_types import GGMLType
from atoma_jax.quant.groups import BF16, F16, F32, GroupCodes, GroupFormat

_FLOAT_DTYPES = {GGMLType.F16: F16, GGMLType.BF16: BF16}
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True, eq=False)
class GGUFTensor:
    """One tensor as it lies in the file: a `StoredTensor`."""

    name: str
    shape: tuple[int, ...]  # outermost first, as numpy: [N, K] for a matrix with K inputs
    type: GGMLType
    data: UInt8[np.ndarray, "rows row_bytes"]  # read-only view of the mapping; rows = product of shape[:-1]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.data.nbytes

    @property
    def format(self) -> GroupFormat | None:
        """How its numbers are quantized; None for plain floats."""
        return ggml.GROUP_FORMATS.get(self.type)

    @property
    def type_name(self) -> str:
        """ggml's name of the type."""
        return self.type.name

    @property
    def float_dtype(self) -> np.dtype[Any]:
        """Of plain floats."""
        return _FLOAT_DTYPES.get(self.type, F32)

    @property
    def permutation(self) -> None:
        """GGUF stores columns in the order of inputs."""
        return

    def decode(self, rows: Rows) -> GroupCodes:
        """Rows of a quantized tensor, leading axes flattened. Thread-safe; results own their memory."""
        return ggml.decode(self.data[rows], self.type)

    def dequantize(self, rows: Rows) -> Floats:
        """Exact f32 values `[rows, K]`; a vector is one row."""
        return ggml.dequantize(self.data[rows], self.type)


class GGUFFile:
    """A `Checkpoint` in GGUF, of one file or several shards, checked as a whole before it is handed out.

    Attributes:
        path: the file that was asked for.
        metadata: that of the first shard; stays valid after `close`.
        tensors: by name, in the order of the files.
    """

    def __init__(self, path: Path, metadata: Metadata, tensors: dict[str, GGUFTensor]):
        """Use `open`."""
        self.path = path
        self.metadata = metadata
        self.tensors = tensors

    @classmethod
    def open(cls, path: str | PathLike[str]) -> "GGUFFile":
        """Opens a file; for any shard named `…-00001-of-00003.gguf`, all of them, which must lie beside it.

        Raises:
            ModelNotFoundError: there is no regular, readable file at `path`, or a shard is missing.
            WeightFileError: a file is damaged, truncated, or contradicts itself or its siblings.
            UnsupportedModelError: a tensor's type has no decoder.
        """
        path = Path(path)
        shard = _Shard.open(path)
        count = shard.metadata.get_int("split.count", 1, maximum=65535)
        shards = [shard] if count <= 1 else _open_siblings(shard, count)
        tensors = _merge(shards)
        for tensor in tensors.values():
            ggml.check_supported(f"{path}: tensor {tensor.name!r} type", tensor.type)
        return cls(path, shards[0].metadata, tensors)

    def close(self) -> None:
        """Forgets all tensors. The files stay mapped until the last view of a tensor is gone."""
        self.tensors = {}

    def __enter__(self) -> "GGUFFile":
        """The file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()


def first_shard(file: GGUFFile) -> Path:
    """The file that holds the model's metadata."""
    count = file.metadata.get_int("split.count", 1)
    name = _SHARD_NAME.fullmatch(file.path.name)
    if count <= 1 or name is None:
        return file.path
    return file.path.with_name(f"{name['prefix']}-00001-of-{count:05}.gguf")


def encoded_metadata(path: Path) -> dict[str, bytes]:
    """The keys of a file, each as the file's own bytes; those that make it a part of a split model are left out."""
    with map_file(path) as mapping:
        places = parse_header(mapping, path).entries
        return {key: mapping[place] for key, place in places.items() if key not in _SPLIT_KEYS}


@dataclass(frozen=True, slots=True)
class _Shard:
    """One file."""

    path: Path
    metadata: Metadata
    tensors: Sequence[GGUFTensor]

    @classmethod
    def open(cls, path: Path) -> "_Shard":
        mapping = map_file(path)
        header = parse_header(mapping, path)
        content = np.frombuffer(mapping, np.uint8)
        tensors = [
            GGUFTensor(
                name=info.name,
                shape=info.shape,
                type=info.type,
                data=content[info.start : info.start + info.nbytes].reshape(info.rows, info.row_bytes),
            )
            for info in header.tensors
        ]
        return cls(path, header.metadata, tensors)


def _open_siblings(shard: _Shard, count: int) -> list[_Shard]:
    """All shards of the model that `shard` is part of, in order."""
    name = _SHARD_NAME.fullmatch(shard.path.name)
    if name is None or int(name["count"]) != count:
        problem = (
            f"the file is one of {count} shards and must be named like …-00001-of-{count:05}.gguf to find the others"
        )
        raise WeightFileError(shard.metadata.field("split.count"), shard.path.name, problem)
    paths = [shard.path.with_name(f"{name['prefix']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        problem = (
            f"needs its {count} shards side by side; {len(missing)} are missing, the first is {missing[0]}: fetch it"
        )
        raise ModelNotFoundError("model", str(shard.path), problem)
    shards = [shard if path == shard.path else _Shard.open(path) for path in paths]
    for number, sibling in enumerate(shards):
        _expect(sibling, "split.no", number)
        _expect(sibling, "split.count", count)
    _expect(shards[0], "split.tensors.count", sum(len(sibling.tensors) for sibling in shards))
    return shards


def _expect(shard: _Shard, key: str, expected: int) -> None:
    found = shard.metadata.get_int(key)
    if found != expected:
        problem = f"must be {expected}: the shards do not belong together, fetch all of them again"
        raise WeightFileError(shard.metadata.field(key), found, problem)


def _merge(shards: Sequence[_Shard]) -> dict[str, GGUFTensor]:
    tensors: dict[str, GGUFTensor] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in tensors:
                raise WeightFileError(f"{shard.path}: tensor name", tensor.name, "is in another shard as well")
            tensors[tensor.name] = tensor
    return tensors
