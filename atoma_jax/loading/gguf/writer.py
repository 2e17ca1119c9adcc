"""Writes a GGUF file tensor by tensor, never holding more of it than the caller hands over at once.

Owns the container (spec: ggml/docs/gguf.md), the reverse of `header.py`, and that a file appears under its name
only when it is whole. Metadata come encoded: whoever copies a file hands over the bytes of its entries, types and all.
The `gguf` package has a writer too, but it takes values, and from a value the type it had in the file cannot be told.
"""

import contextlib
import os
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np

from atoma_jax.errors import ConfigError, UserError
from atoma_jax.quant.ggml_types import BLOCK_SIZES, GGMLType

_Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

_VERSION = 3
_U32_TYPE = 4


def check_target(path: Path, *, force: bool) -> None:
    """Refuses a place for a file before anything is read.

    Raises:
        ConfigError: its folder does not exist, it is no name of a GGUF file, or something is there.
    """
    if not path.absolute().parent.is_dir():
        problem = f"needs the folder {path.parent}, which does not exist; make it first"
        raise ConfigError("out", str(path), problem)
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise ConfigError("out", str(path), "is a folder or device; name a .gguf file")
    if path.suffix != ".gguf":
        raise ConfigError("out", str(path), "must be the name of a .gguf file, as which it is found again")
    if path.exists() and not force:
        raise ConfigError("out", str(path), "exists; --force replaces it")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]  # outermost first
    type: GGMLType

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        block = BLOCK_SIZES[self.type]
        return prod(self.shape) // block.elements * block.bytes


def encode_u32(key: str, value: int) -> bytes:
    """The entry of a number."""
    return _text(key) + struct.pack("<II", _U32_TYPE, value)


class GGUFWriter:
    """One file. Use as a context manager: `write` the data of all tensors, in order and in pieces of any size; leaving
    moves the file into place, and an exception removes what there is of it.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, bytes], tensors: Sequence[TensorEntry], *, alignment: int = 32
    ):
        """Nothing is touched before the context is entered.

        Args:
            path: where the file will be; what is there is replaced at the end.
            entries: encoded metadata by key, in order.
            tensors: all of them.
            alignment: of each tensor's data, in bytes; `general.alignment` has to say the same.
        """
        self._path = path
        self._alignment = alignment
        self._sizes = [tensor.nbytes for tensor in tensors]
        self._header = self._encode(entries, tensors)
        self._written = 0  # of the tensor at hand
        self._current = 0

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return len(self._header) + sum(self._padded(size) for size in self._sizes)

    def __enter__(self) -> "GGUFWriter":
        """Opens a temporary file beside the final one, and writes the header.

        Raises:
            UserError: there can be no file at the path, or the disk is full.
        """
        self._temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}.part")
        try:
            self._file = self._temporary.open("xb")
        except OSError as error:
            raise self._cannot(error) from error
        try:
            self._put(self._header)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, data: _Bytes) -> None:
        """Appends to the tensor at hand; once it is whole, the next one's turn comes.

        Raises:
            UserError: the disk is full, or the file cannot be written for another reason.
        """
        size = self._sizes[self._current]
        self._written += data.nbytes
        assert self._written <= size, (self._current, self._written, size)
        self._put(data.data)
        if self._written == size:
            self._put(bytes(self._padded(size) - size))
            self._current, self._written = self._current + 1, 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Moves the file into place, or removes it."""
        if error is not None:
            self._discard()
            return
        try:
            assert self._current == len(self._sizes), "tensors are missing"
            self._finish()
        except BaseException:
            self._discard()
            raise

    def _finish(self) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.replace(self._path)
        except OSError as error:
            raise self._cannot(error) from error

    def _discard(self) -> None:
        self._temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk again, at what was still buffered
            self._file.close()

    def _put(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise self._cannot(error) from error

    def _cannot(self, error: OSError) -> UserError:
        return UserError("out", str(self._path), f"cannot be written ({error.strerror}); choose another folder")

    def _padded(self, size: int) -> int:
        return -(-size // self._alignment) * self._alignment

    def _encode(self, entries: Mapping[str, bytes], tensors: Sequence[TensorEntry]) -> bytes:
        parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(tensors), len(entries)), *entries.values()]
        offset = 0
        for tensor in tensors:
            dims = tensor.shape[::-1]  # innermost first
            parts.append(_text(tensor.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type, offset))
            offset += self._padded(tensor.nbytes)
        header = b"".join(parts)
        return header.ljust(self._padded(len(header)), b"\0")


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded
