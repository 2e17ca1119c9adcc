"""Bounded parser of the header of one GGUF file: metadata and the table of tensors.

Every count, length, offset and dimension is compared with the bytes that are left before anything is allocated for
it, so a hostile file costs no more memory than its own header. Owns the container's rules (spec: ggml/docs/gguf.md).
Opening and mapping files and putting shards together is `file.py`'s, the meaning of keys is that of the model's code.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from atoma_jax.errors import WeightFileError
from atoma_jax.loading.gguf.metadata import Metadata, MetadataValue, StringArray
from atoma_jax.quant.ggml_types import BLOCK_SIZES, GGMLType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 has 32-bit counts
_DEFAULT_ALIGNMENT = 32

# Far above any real file, low enough that Python objects made from a file of small entries stay below 1 GB.
_MAX_HEADER_BYTES = 1 << 28
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 18
_MAX_NESTED_ARRAYS = 1 << 16
_MAX_NESTING = 4
_MAX_KEY_BYTES = 65535
_MAX_NAME_BYTES = 64
_MAX_DIMS = 4
_MAX_ALIGNMENT = 1 << 20
_INT64_MAX = 2**63 - 1

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS: Mapping[int, struct.Struct] = {
    type_id: struct.Struct("<" + code)
    for type_id, code in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}.items()
}
_MIN_VALUE_BYTES = {type_id: number.size for type_id, number in _NUMBERS.items()} | {_BOOL: 1, _STRING: 8, _ARRAY: 12}
_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # length, one character, type, the smallest value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8  # length, one character, n_dims = 0, type, offset


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the table of tensors; all of it is known to be consistent with the file's size."""

    name: str
    shape: tuple[int, ...]  # outermost first, as numpy: the file's order reversed
    type: GGMLType
    start: int  # byte of the file where the data begins
    rows: int  # product of all dimensions but the last
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of data in the file."""
        return self.rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says about itself."""

    metadata: Metadata
    tensors: tuple[TensorInfo, ...]  # in the file's order
    entries: Mapping[str, slice]  # bytes of the file that hold each key with its type and value


def parse_header(buffer: mmap.mmap, path: Path) -> Header:
    """Reads the header of a mapped file; `path` is named in errors.

    Raises:
        WeightFileError: the file is damaged, truncated or contradicts itself.
    """
    return _Parser(buffer, path).header()


class _Parser:
    """A cursor over the header that never passes its limit."""

    def __init__(self, buffer: mmap.mmap, path: Path):
        self._buffer = buffer
        self._path = path
        self._position = 0
        self._limit = min(len(buffer), _MAX_HEADER_BYTES)
        self._nested_arrays_left = _MAX_NESTED_ARRAYS

    def header(self) -> Header:
        """The whole header, from byte 0."""
        self._check_identity()
        n_tensors = self._count("n_tensors", _MIN_TENSOR_BYTES, _MAX_TENSORS)
        n_kv = self._count("n_kv", _MIN_KEY_BYTES, _MAX_KEYS)
        values: dict[str, MetadataValue | StringArray] = {}
        entries: dict[str, slice] = {}
        for index in range(n_kv):
            start = self._position
            field = f"metadata key {index} of {n_kv}"
            key = self._text(field, _MAX_KEY_BYTES)
            if key in values:
                raise self._error(field, key, "is a duplicate; every key may appear once")
            field = f"metadata {key!r}"
            values[key] = self._value(self._unsigned(_U32, f"{field} type"), field)
            entries[key] = slice(start, self._position)
        metadata = Metadata(self._path, values)
        return Header(metadata, self._tensors(n_tensors, _alignment(metadata)), entries)

    def _check_identity(self) -> None:
        magic = self._take(4, "magic")
        if magic != _MAGIC:
            raise self._error("magic", magic, f"must be {_MAGIC!r}; this is no GGUF file")
        version = self._unsigned(_U32, "version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in _VERSIONS:
                raise self._error("version", version, "the file is big-endian; convert it to little-endian")
            raise self._error("version", version, f"must be one of {_VERSIONS}; convert the model anew")

    def _error(self, field: str, value: object, problem: str) -> WeightFileError:
        return WeightFileError(f"{self._path}: {field}", value, problem)

    def _take(self, size: int, field: str) -> bytes:
        """The next `size` bytes."""
        start = self._position
        if size > self._limit - start:
            raise self._too_long(field, size)
        self._position = start + size
        return self._buffer[start : self._position]

    def _too_long(self, field: str, size: int) -> WeightFileError:
        if self._limit == _MAX_HEADER_BYTES:
            problem = (
                f"passes the limit of {_MAX_HEADER_BYTES} bytes for a header: needs bytes from {self._position} on"
            )
        else:
            problem = (
                f"needs bytes from {self._position} on and the file ends at byte {self._limit}: "
                "it is damaged or incomplete, fetch it again"
            )
        return self._error(field, f"{size} bytes", problem)

    def _unsigned(self, number: struct.Struct, field: str) -> int:
        return number.unpack(self._take(number.size, field))[0]

    def _count(self, field: str, item_bytes: int, maximum: int | None = None) -> int:
        """A u64 that counts things of at least `item_bytes` each, all of which must fit into what is left."""
        count = self._unsigned(_U64, field)
        left = self._limit - self._position
        if count > left // item_bytes:
            problem = f"each takes at least {item_bytes} bytes and {left} are left: the file is damaged or incomplete"
            raise self._error(field, count, problem)
        if maximum is not None and count > maximum:
            raise self._error(field, count, f"must be at most {maximum}")
        return count

    def _text(self, field: str, max_bytes: int | None = None) -> str:
        """A string; a name, which may not be empty, where `max_bytes` is given."""
        size = self._unsigned(_U64, f"{field} length")
        if max_bytes is not None and not 1 <= size <= max_bytes:
            raise self._error(f"{field} length", size, f"must be in [1, {max_bytes}]")
        encoded = self._take(size, field)
        try:
            return encoded.decode()
        except UnicodeDecodeError as error:
            raise self._error(field, encoded, "must be UTF-8; the file is damaged") from error

    def _value(self, type_id: int, field: str) -> MetadataValue | StringArray:
        if type_id == _STRING:
            return self._text(field)
        if type_id == _ARRAY:
            return self._array(field, depth=1)
        if type_id == _BOOL:
            value = self._take(1, field)[0]
            if value > 1:
                raise self._error(field, value, "must be a bool, a byte of 0 or 1")
            return bool(value)
        if type_id in _NUMBERS:
            number = _NUMBERS[type_id]
            return number.unpack(self._take(number.size, field))[0]
        raise self._error(f"{field} type", type_id, "must be a value type of GGUF, 0 to 12")

    def _array(self, field: str, depth: int) -> MetadataValue | StringArray:
        type_id = self._unsigned(_U32, f"{field} array type")
        if type_id not in _MIN_VALUE_BYTES:
            raise self._error(f"{field} array type", type_id, "must be a value type of GGUF, 0 to 12")
        count = self._count(f"{field} array length", _MIN_VALUE_BYTES[type_id])
        if type_id == _STRING:
            return self._strings(count, field)
        if type_id == _ARRAY:
            return self._nested(count, field, depth)
        code = "?" if type_id == _BOOL else _NUMBERS[type_id].format
        encoded = self._take(count * _MIN_VALUE_BYTES[type_id], field)
        if type_id == _BOOL and encoded.translate(None, b"\x00\x01"):
            raise self._error(field, f"{count} bytes", "must be an array of bools, bytes of 0 or 1")
        return np.frombuffer(encoded, code)  # read-only, for bytes are

    def _nested(self, count: int, field: str, depth: int) -> list[MetadataValue]:
        if depth == _MAX_NESTING:
            raise self._error(field, depth + 1, f"arrays may nest at most {_MAX_NESTING} deep")
        self._nested_arrays_left -= count
        if self._nested_arrays_left < 0:
            raise self._error(field, count, f"a file may hold at most {_MAX_NESTED_ARRAYS} arrays inside arrays")
        arrays: list[MetadataValue] = []
        for index in range(count):
            array = self._array(f"{field}[{index}]", depth + 1)
            arrays.append(array.decode() if isinstance(array, StringArray) else array)
        return arrays

    def _strings(self, count: int, field: str) -> StringArray:
        """Walks over the strings; a vocabulary is 10^5 to 10^6 steps, so the loop does nothing else."""
        buffer, read_length = self._buffer, _U64.unpack_from
        start = position = self._position
        index = 0
        try:
            for index in range(count):  # noqa: B007  the error below names it
                position += 8 + read_length(buffer, position)[0]
        except (struct.error, OverflowError) as error:  # a position past the end, or past 2^63
            raise self._too_long(f"{field}[{index}] or the string before it", position - start) from error
        return StringArray(f"{self._path}: {field}", self._take(position - start, field), count)

    def _tensors(self, count: int, alignment: int) -> tuple[TensorInfo, ...]:
        """The table of tensors, and the checks that need all of it."""
        entries: dict[str, tuple[tuple[int, ...], GGMLType, int]] = {}
        for index in range(count):
            field = f"tensor {index} of {count}"
            name = self._text(f"{field} name", _MAX_NAME_BYTES)
            if name in entries:
                raise self._error(f"{field} name", name, "is a duplicate; every tensor may appear once")
            field = f"tensor {name!r}"
            entries[name] = (self._shape(field), self._type(field), self._unsigned(_U64, f"{field} offset"))
        data_start = -(-self._position // alignment) * alignment
        infos = tuple(self._place(name, *entry, alignment, data_start) for name, entry in entries.items())
        self._check_overlap(infos)
        return infos

    def _shape(self, field: str) -> tuple[int, ...]:
        n_dims = self._unsigned(_U32, f"{field} n_dims")
        if n_dims > _MAX_DIMS:
            raise self._error(f"{field} n_dims", n_dims, f"must be at most {_MAX_DIMS}")
        dims = struct.unpack(f"<{n_dims}Q", self._take(8 * n_dims, f"{field} dims"))
        if min(dims, default=1) < 1:
            raise self._error(f"{field} dims", dims, "must all be at least 1")
        if prod(dims) > _INT64_MAX:
            raise self._error(f"{field} dims", dims, "must have a product below 2^63")
        return dims[::-1]

    def _type(self, field: str) -> GGMLType:
        type_id = self._unsigned(_U32, f"{field} type")
        try:
            return GGMLType(type_id)
        except ValueError:
            problem = "is no tensor type of ggml: the file is damaged, or newer than this program"
            raise self._error(f"{field} type", type_id, problem) from None

    def _place(
        self, name: str, shape: tuple[int, ...], ggml_type: GGMLType, offset: int, alignment: int, data_start: int
    ) -> TensorInfo:
        """Checks one tensor against the file's size."""
        field = f"tensor {name!r}"
        block = BLOCK_SIZES[ggml_type]
        K = shape[-1] if shape else 1
        if K % block.elements:
            problem = f"must be a multiple of {block.elements}, the block size of {ggml_type.name}"
            raise self._error(f"{field} dims[0]", K, problem)
        if offset % alignment:
            raise self._error(f"{field} offset", offset, f"must be a multiple of the alignment {alignment}")
        info = TensorInfo(
            name, shape, ggml_type, data_start + offset, prod(shape[:-1]), K // block.elements * block.bytes
        )
        if info.start + info.nbytes > len(self._buffer):
            problem = (
                f"needs {info.nbytes} bytes from byte {info.start} on and the file ends at byte {len(self._buffer)}: "
                "it is damaged or incomplete, fetch it again"
            )
            raise self._error(f"{field} offset", offset, problem)
        return info

    def _check_overlap(self, infos: tuple[TensorInfo, ...]) -> None:
        end, before = 0, ""
        for info in sorted(infos, key=lambda info: info.start):
            if info.start < end:
                problem = f"overlaps tensor {before!r}, which ends at byte {end} of the file"
                raise self._error(f"tensor {info.name!r} offset", f"byte {info.start} of the file", problem)
            end, before = info.start + info.nbytes, info.name


def _alignment(metadata: Metadata) -> int:
    key = "general.alignment"
    alignment = metadata.get_int(key, _DEFAULT_ALIGNMENT, minimum=8, maximum=_MAX_ALIGNMENT)
    if alignment & (alignment - 1):
        raise WeightFileError(metadata.field(key), alignment, "must be a power of two")
    return alignment
