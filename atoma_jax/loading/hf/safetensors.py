"""Reads safetensors files and folders of them: maps each file and gives tensors as views of the mapping.

Headers and indices are JSON of a fixed, flat shape. They are scanned piece by piece instead of parsed as JSON at large:
what does not fit is refused where it starts, before anything is built of it: a header costs what its valid part does.
The rules are those of the format (https://huggingface.co/docs/safetensors, "Format"). Knows nothing of quantization.
"""

import json
import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from atoma_jax.errors import ModelNotFoundError, UnsupportedModelError, WeightFileError
from atoma_jax.loading.mapped import map_file

_Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# As numpy holds them: bfloat16 and float8 as unsigned integers of their bits, bytes of booleans as they are.
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "F32": np.dtype("<f4"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype("<u2"),
        "F8_E4M3": np.dtype("u1"),
        "I8": np.dtype("i1"),
        "U8": np.dtype("u1"),
        "I16": np.dtype("<i2"),
        "I32": np.dtype("<i4"),
        "I64": np.dtype("<i8"),
        "BOOL": np.dtype("u1"),
    }
)
_NOT_IMPLEMENTED = frozenset(
    {"F64", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4", "U16", "U32", "U64", "C64"}
)

MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library
MAX_INDEX = 64 << 20  # bytes
MAX_TENSORS = 1 << 18  # the largest published models have a tenth in all their files
MAX_NAME = 1024  # characters
_MAX_METADATA = 4 << 20  # bytes of a header's notes, which nothing here reads
_MAX_SHARDS = 65535

_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# Possessive and bounded: a match takes time in proportion to what it matches, however a header is written.
_WS = r"[ \t\r\n]{0,65536}+"
_STRING = r'"((?:[^"\\\x00-\x1f]|\\.){0,%d}+)"'
_INT = r"(?:0|[1-9][0-9]{0,19})"
_NAME = re.compile(rf"{_WS}{_STRING % MAX_NAME}{_WS}:{_WS}\{{{_WS}".encode())
_FIELD = re.compile(
    rf'{_WS}"(dtype|shape|data_offsets)"{_WS}:{_WS}'
    rf'(?:"([A-Za-z0-9_]{{1,16}})"|\[{_WS}((?:{_INT}(?:{_WS},{_WS}{_INT}){{0,7}})?){_WS}\]){_WS}([,}}])'.encode()
)
_TEXT_PAIR = re.compile(rf"{_WS}{_STRING % MAX_NAME}{_WS}:{_WS}{_STRING % (1 << 20)}{_WS}([,}}])".encode())
_SCALAR_PAIR = re.compile(
    rf"{_WS}{_STRING % MAX_NAME}{_WS}:{_WS}"
    rf"(?:{_STRING % MAX_NAME}|[-+.0-9eE]{{1,40}}|true|false|null){_WS}([,}}])".encode()
)
_OPEN, _EMPTY = re.compile(rf"{_WS}\{{".encode()), re.compile(rf"{_WS}\}}".encode())
_NEXT = re.compile(rf"{_WS}([,}}])".encode())
_END = re.compile(rf"{_WS}\Z".encode())
_MAX_ELEMENTS = 1 << 60
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,242}\.safetensors")


@dataclass(frozen=True, slots=True, eq=False)
class RawTensor:
    """One tensor as it lies in a file."""

    name: str
    path: Path
    dtype: str  # a key of `DTYPES`
    data: _Array  # a read-only view of the mapping, in the tensor's shape; its address may be no multiple of an item

    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost first."""
        return self.data.shape

    @property
    def field(self) -> str:
        """File and tensor, for errors."""
        return f"{self.path}: tensor {self.name!r}"


def open_weights(folder: Path) -> dict[str, RawTensor]:
    """All tensors of a model's folder: `model.safetensors`, the shards of its index, or its only *.safetensors file.

    Raises:
        ModelNotFoundError: there is none of these, or a shard is missing.
        WeightFileError: a file is damaged, truncated, or contradicts itself or the index.
        UnsupportedModelError: a tensor's dtype has no reader.
    """
    if (folder / "model.safetensors").exists():
        return open_file(folder / "model.safetensors")
    if (folder / _INDEX).exists():
        return _open_shards(folder)
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise ModelNotFoundError("model", str(folder), f"the folder cannot be read ({error.strerror})") from error
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return open_file(folder / found[0])
    if found:
        problem = f"has {len(found)} *.safetensors files and no {_INDEX}, which would say how they belong together"
        raise ModelNotFoundError("model", str(folder), problem)
    pickled = [name for name in names if name.endswith(_PICKLED)]
    problem = f"holds no weights; looked for model.safetensors, {_INDEX} and *.safetensors"
    if pickled:
        problem += f"; {pickled[0]} is pickled code and never read: convert it to safetensors"
    raise ModelNotFoundError("model", str(folder), problem)


def open_file(path: Path) -> dict[str, RawTensor]:
    """The tensors of one file, by name, in the order of their data.

    Raises:
        ModelNotFoundError: there is no regular, readable file at `path`.
        WeightFileError: the file is damaged, truncated or contradicts itself.
        UnsupportedModelError: a tensor's dtype has no reader.
    """
    mapping = map_file(path)
    start, entries = _parse_header(mapping, path)
    content = np.frombuffer(mapping, np.uint8)
    tensors: dict[str, RawTensor] = {}
    for entry in entries:
        data = content[start + entry.begin : start + entry.end].view(DTYPES[entry.dtype]).reshape(entry.shape)
        tensors[entry.name] = RawTensor(entry.name, path, entry.dtype, data)
    return tensors


# Headers


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a header says of one tensor. Offsets count from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Scanner:
    """A place in JSON of a known shape, which moves on match by match."""

    def __init__(self, text: mmap.mmap, start: int, end: int, path: Path):
        self.position = start
        self._text, self._end, self._path = text, end, path

    def match(self, pattern: re.Pattern[bytes], expected: str) -> re.Match[bytes]:
        """The pattern here; an error that says what was expected where it is not."""
        found = pattern.match(self._text, self.position, self._end)
        if found is None:
            excerpt = self._text[self.position : min(self.position + 40, self._end)]
            raise WeightFileError(f"{self._path}: header byte {self.position}", excerpt, f"must be {expected}")
        self.position = found.end()
        return found

    def takes(self, pattern: re.Pattern[bytes]) -> bool:
        """Whether the pattern is here, and then behind it."""
        found = pattern.match(self._text, self.position, self._end)
        if found is not None:
            self.position = found.end()
        return found is not None

    def text(self, found: re.Match[bytes], group: int) -> str:
        """A matched string without its escapes."""
        raw = found.group(group)
        try:
            if b"\\" not in raw:
                return raw.decode()
            text: str = json.loads(b'"%s"' % raw)  # a string by itself: neither nesting nor numbers can come in
            text.encode()  # lone surrogates do not
        except ValueError as error:
            where = f"{self._path}: header byte {found.start(group)}"
            raise WeightFileError(where, raw, "must be UTF-8 with valid escapes; the file is damaged") from error
        return text


def _parse_header(mapping: mmap.mmap, path: Path) -> tuple[int, list[_Entry]]:
    """Where the data begins, and the checked entries in the order of the data."""
    if len(mapping) < 8:
        raise WeightFileError(f"{path}: header length", f"{len(mapping)} bytes", "needs 8 bytes; the file is truncated")
    (length,) = struct.unpack_from("<Q", mapping)
    if length > MAX_HEADER:
        raise WeightFileError(f"{path}: header length", length, f"must be at most {MAX_HEADER}; no safetensors file")
    start = 8 + length
    if start > len(mapping):
        problem = f"must fit into the file of {len(mapping)} bytes; the file is truncated"
        raise WeightFileError(f"{path}: header length", length, problem)
    scanner = _Scanner(mapping, 8, start, path)
    entries = list(_entries(scanner, path))
    _check_layout(entries, len(mapping) - start, path)
    return start, entries


def _entries(scanner: _Scanner, path: Path) -> Iterator[_Entry]:
    """Every tensor of a header, sorted by its data."""
    entries: dict[str, _Entry] = {}
    seen_metadata = False
    scanner.match(_OPEN, "'{', the start of a header")
    more = not scanner.takes(_EMPTY)
    while more:
        found = scanner.match(_NAME, f"a name of at most {MAX_NAME} characters and an object")
        name = scanner.text(found, 1)
        if name == "__metadata__":
            if seen_metadata:
                raise WeightFileError(f"{path}: header", name, "is a duplicate; every key may appear once")
            seen_metadata = True
            _skip_metadata(scanner, path)
        else:
            field = f"{path}: tensor {name!r}"
            if not name:
                raise WeightFileError(f"{path}: header byte {found.start()}", name, "a tensor must have a name")
            if name in entries:
                raise WeightFileError(field, name, "is a duplicate; every tensor may appear once")
            if len(entries) == MAX_TENSORS:
                raise WeightFileError(f"{path}: header", name, f"may hold at most {MAX_TENSORS} tensors")
            entries[name] = _entry(scanner, name, field)
        more = scanner.match(_NEXT, "',' or '}'").group(1) == b","
    scanner.match(_END, "the end of the header")
    yield from sorted(entries.values(), key=lambda entry: (entry.begin, entry.end))


def _skip_metadata(scanner: _Scanner, path: Path) -> None:
    start, more = scanner.position, not scanner.takes(_EMPTY)
    while more:
        found = scanner.match(_TEXT_PAIR, "a pair of strings of __metadata__")
        scanner.text(found, 1)
        scanner.text(found, 2)
        if scanner.position - start > _MAX_METADATA:
            raise WeightFileError(f"{path}: __metadata__", "more", f"must be at most {_MAX_METADATA} bytes")
        more = found.group(3) == b","


def _entry(scanner: _Scanner, name: str, field: str) -> _Entry:
    """The object of one tensor, behind its '{'."""
    values: dict[bytes, re.Match[bytes]] = {}
    more = True
    while more:
        found = scanner.match(_FIELD, "dtype (a string), shape (at most 8 whole numbers) or data_offsets of a tensor")
        if found.group(1) in values:
            raise WeightFileError(f"{field} {found.group(1).decode()}", name, "is a duplicate")
        values[found.group(1)] = found
        more = found.group(4) == b","
    missing = {b"dtype", b"shape", b"data_offsets"} - values.keys()
    if missing:
        raise WeightFileError(f"{field} {min(missing).decode()}", None, "is missing")
    dtype = _text_of(values[b"dtype"], field)
    if dtype in _NOT_IMPLEMENTED:
        raise UnsupportedModelError(f"{field} dtype", dtype, f"is not implemented; those that are: {', '.join(DTYPES)}")
    if dtype not in DTYPES:
        raise WeightFileError(f"{field} dtype", dtype, "is no dtype of safetensors: the file is damaged, or newer")
    shape = _numbers_of(values[b"shape"], field)
    offsets = _numbers_of(values[b"data_offsets"], field)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightFileError(f"{field} data_offsets", offsets, "must be a begin and an end that is no smaller")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if max(shape, default=0) >= 2**63 or nbytes >= 2**63:
        raise WeightFileError(f"{field} shape", shape, "must have fewer than 2^63 bytes")
    if math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:  # numpy counts them even where one is 0
        raise WeightFileError(f"{field} shape", shape, f"must have sizes whose product is at most {_MAX_ELEMENTS}")
    if nbytes != offsets[1] - offsets[0]:
        problem = f"must span {nbytes} bytes, which is what {dtype} of shape {list(shape)} takes"
        raise WeightFileError(f"{field} data_offsets", offsets, problem)
    return _Entry(name, dtype, shape, *offsets)


def _text_of(found: re.Match[bytes], field: str) -> str:
    if found.group(2) is None:
        raise WeightFileError(f"{field} {found.group(1).decode()}", found.group(3), "must be a string")
    return found.group(2).decode()


def _numbers_of(found: re.Match[bytes], field: str) -> tuple[int, ...]:
    if found.group(3) is None:
        raise WeightFileError(f"{field} {found.group(1).decode()}", found.group(2), "must be a list of whole numbers")
    return tuple(int(number) for number in found.group(3).split(b",") if number)


def _check_layout(entries: list[_Entry], size: int, path: Path) -> None:
    """Tensors fill the data from its first byte to its last, each where the one before it ends."""
    end, before = 0, "the header"
    for entry in entries:
        field, value = f"{path}: tensor {entry.name!r} data_offsets", (entry.begin, entry.end)
        if entry.end > size:
            raise WeightFileError(field, value, f"must end within the {size} bytes of data; the file is truncated")
        if entry.begin < end:
            raise WeightFileError(field, value, f"overlaps {before}, which ends at {end}")
        if entry.begin > end:
            raise WeightFileError(field, value, f"leaves a hole behind {before}, which ends at {end}")
        end, before = entry.end, f"tensor {entry.name!r}"
    if end != size:
        raise WeightFileError(f"{path}: data", f"{size} bytes", f"must end where {before} ends, at byte {end}")


# Shards


def _open_shards(folder: Path) -> dict[str, RawTensor]:
    """The tensors of all shards that the index names; index and shards must agree on every tensor."""
    index = folder / _INDEX
    places = _read_index(index)
    files = sorted(set(places.values()))
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        problem = f"needs its {len(files)} shards side by side; {len(missing)} are missing, the first is {missing[0]}"
        raise ModelNotFoundError("model", str(folder), f"{problem}: fetch it")
    tensors: dict[str, RawTensor] = {}
    for name in files:
        shard = open_file(folder / name)
        for tensor in shard.values():
            if places.get(tensor.name) != name:
                problem = f"is in {name}, where {_INDEX} does not place it"
                raise WeightFileError(tensor.field, places.get(tensor.name), problem)
        tensors |= shard
    absent = next((name for name in places if name not in tensors), None)
    if absent is not None:
        raise WeightFileError(f"{index}: weight_map", absent, f"places a tensor in {places[absent]} that is not there")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """Tensor → shard's file name."""
    mapping = map_file(path)
    if len(mapping) > MAX_INDEX:
        raise WeightFileError(f"{path}: size", len(mapping), f"must be at most {MAX_INDEX} bytes")
    scanner = _Scanner(mapping, 0, len(mapping), path)
    places: dict[str, str] | None = None
    scanner.match(_OPEN, "'{', the start of an index")
    more = True
    while more:
        key = scanner.text(scanner.match(_NAME, "a key of an index and an object"), 1)
        if key == "weight_map":
            if places is not None:
                raise WeightFileError(f"{path}: weight_map", key, "is a duplicate")
            places = _read_places(scanner, path)
        elif not scanner.takes(_EMPTY):
            while scanner.match(_SCALAR_PAIR, f"a name and a plain value of {key!r}").group(3) == b",":
                pass
        more = scanner.match(_NEXT, "',' or '}'").group(1) == b","
    scanner.match(_END, "the end of the index")
    if not places:
        raise WeightFileError(f"{path}: weight_map", None, "is missing or empty")
    return places


def _read_places(scanner: _Scanner, path: Path) -> dict[str, str]:
    places: dict[str, str] = {}
    more = not scanner.takes(_EMPTY)
    shards: set[str] = set()
    while more:
        found = scanner.match(_TEXT_PAIR, "a tensor's name and that of its file")
        name, file = scanner.text(found, 1), scanner.text(found, 2)
        if name in places:
            raise WeightFileError(f"{path}: weight_map {name!r}", file, "is a duplicate; every tensor may appear once")
        if file not in shards and not _SHARD_NAME.fullmatch(file):
            problem = "must be the name of a .safetensors file beside the index, without a folder"
            raise WeightFileError(f"{path}: weight_map {name!r}", file, problem)
        places[name] = file
        shards.add(file)
        if len(places) > MAX_TENSORS or len(shards) > _MAX_SHARDS:
            raise WeightFileError(f"{path}: weight_map", name, f"may hold at most {MAX_TENSORS} tensors")
        more = found.group(3) == b","
    return places
