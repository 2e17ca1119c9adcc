"""The key/value metadata of a GGUF file, and checked access to it.

Owns types and limits of single values, so that code that reads a model's configuration states what it expects and
nothing else. It does not parse the file (`header.py`) and does not know what any key means.
"""

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, overload

import numpy as np
from jaxtyping import Float64, Int64

from atoma_jax.errors import WeightFileError

# `list[Any]` is an array of arrays, which no model in use has.
MetadataValue: TypeAlias = int | float | bool | str | np.ndarray[Any, np.dtype[Any]] | list[str] | list[Any]

_LENGTH = struct.Struct("<Q")
_INT32_MAX = 2**31 - 1


class _Missing(Enum):
    REQUIRED = "required"


_REQUIRED = _Missing.REQUIRED
_Required: TypeAlias = Literal[_Missing.REQUIRED]
_Default = TypeVar("_Default")


class StringArray:
    """An array of strings that is decoded when first asked for: a plan of memory needs no vocabulary.

    Holds a copy of the array's bytes, so it outlives the file.
    """

    def __init__(self, field: str, encoded: bytes, count: int):
        """`encoded` is `count` strings, each after its length as u64: the caller has checked that they fill it."""
        self._field = field
        self._encoded = encoded
        self._count = count

    def decode(self) -> list[str]:
        """The strings.

        GGUF defines strings as UTF-8, and a vocabulary of raw bytes spells them `<0x0A>` or in GPT-2's alphabet. So
        other bytes mean damage: replacing them would merge tokens, surrogates would fail when an answer is sent.

        Raises:
            WeightFileError: a string is not UTF-8.
        """
        strings: list[str] = []
        append, encoded, read_length = strings.append, self._encoded, _LENGTH.unpack_from  # a loop over 10^6 strings
        position = 0
        for _ in range(self._count):
            start = position + 8
            position = start + read_length(encoded, position)[0]
            try:
                append(encoded[start:position].decode())
            except UnicodeDecodeError as error:
                field = f"{self._field}[{len(strings)}]"
                raise WeightFileError(field, encoded[start:position], "must be UTF-8; the file is damaged") from error
        return strings


class Metadata(Mapping[str, MetadataValue]):
    """Metadata of one file: a read-only mapping, plus getters that check type and range.

    Integers and floats of any width are Python's, numeric arrays are numpy's (read-only), arrays of strings are lists.
    Each getter raises `WeightFileError` with file, key, value and what was expected if the key is missing and has no
    default, if the type differs (an integer is no float, a bool is no integer), or if the value is out of range. A
    default is returned unchecked.
    """

    def __init__(self, path: Path, values: Mapping[str, MetadataValue | StringArray]):
        """`path` is named in errors."""
        self._path = path
        self._values = dict(values)

    def __getitem__(self, key: str) -> MetadataValue:
        value = self._values[key]
        if isinstance(value, StringArray):
            value = value.decode()
            self._values[key] = value
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values  # the inherited one would decode

    def field(self, key: str) -> str:
        """How errors name a key of this file."""
        return f"{self._path}: metadata {key!r}"

    @overload
    def get_int(self, key: str, *, minimum: int = 0, maximum: int = _INT32_MAX) -> int: ...
    @overload
    def get_int(
        self, key: str, default: _Default, *, minimum: int = 0, maximum: int = _INT32_MAX
    ) -> int | _Default: ...
    def get_int(
        self, key: str, default: _Default | _Required = _REQUIRED, *, minimum: int = 0, maximum: int = _INT32_MAX
    ) -> int | _Default:
        """An integer in [minimum, maximum]."""

        def is_valid(value: MetadataValue) -> bool:
            return type(value) is int and minimum <= value <= maximum

        return self._get(key, default, is_valid, f"an integer in [{minimum}, {maximum}]")

    @overload
    def get_float(
        self, key: str, *, minimum: float = ..., maximum: float = ..., above: float | None = ...
    ) -> float: ...
    @overload
    def get_float(
        self, key: str, default: _Default, *, minimum: float = ..., maximum: float = ..., above: float | None = ...
    ) -> float | _Default: ...
    def get_float(
        self,
        key: str,
        default: _Default | _Required = _REQUIRED,
        *,
        minimum: float = -math.inf,
        maximum: float = math.inf,
        above: float | None = None,
    ) -> float | _Default:
        """A finite float in [minimum, maximum], and greater than `above` where that is given."""

        def is_valid(value: MetadataValue) -> bool:
            return (
                type(value) is float
                and math.isfinite(value)
                and minimum <= value <= maximum
                and (above is None or value > above)
            )

        lower = f"[{minimum}" if above is None else f"({above}"
        return self._get(key, default, is_valid, f"a finite float in {lower}, {maximum}]")

    @overload
    def get_bool(self, key: str) -> bool: ...
    @overload
    def get_bool(self, key: str, default: _Default) -> bool | _Default: ...
    def get_bool(self, key: str, default: _Default | _Required = _REQUIRED) -> bool | _Default:
        """A bool."""
        return self._get(key, default, lambda value: type(value) is bool, "a bool")

    @overload
    def get_str(self, key: str) -> str: ...
    @overload
    def get_str(self, key: str, default: _Default) -> str | _Default: ...
    def get_str(self, key: str, default: _Default | _Required = _REQUIRED) -> str | _Default:
        """A string."""
        return self._get(key, default, lambda value: type(value) is str, "a string")

    def get_strings(self, key: str) -> list[str]:
        """An array of strings, such as a vocabulary."""

        def is_valid(value: MetadataValue) -> bool:
            return isinstance(value, list) and all(type(item) is str for item in value)

        return self._get(key, _REQUIRED, is_valid, "an array of strings")

    def get_ints(self, key: str, *, length: int | None = None) -> Int64[np.ndarray, " length"]:
        """An array of integers of up to 32 bits (of `length` values where given), such as token types."""

        def is_valid(value: MetadataValue) -> bool:
            return (
                isinstance(value, np.ndarray)
                and value.dtype.kind in "iu"
                and length in (None, len(value))
                and bool(((value >= -_INT32_MAX) & (value <= _INT32_MAX)).all())
            )

        return self._get(key, _REQUIRED, is_valid, f"an array of {_counted(length)}32-bit integers").astype(np.int64)

    def get_floats(self, key: str, *, length: int | None = None) -> Float64[np.ndarray, " length"]:
        """An array of finite floats (of `length` values where given), such as token scores."""

        def is_valid(value: MetadataValue) -> bool:
            return (
                isinstance(value, np.ndarray)
                and value.dtype.kind == "f"
                and length in (None, len(value))
                and bool(np.isfinite(value).all())
            )

        return self._get(key, _REQUIRED, is_valid, f"an array of {_counted(length)}finite floats").astype(np.float64)

    def get_int_per_layer(
        self, key: str, default: int | None = None, *, layers: int, minimum: int = 0, maximum: int = _INT32_MAX
    ) -> list[int]:
        """One integer in [minimum, maximum] for each layer; file and default may hold one for all of them."""

        def is_valid(value: MetadataValue) -> bool:
            if isinstance(value, np.ndarray):
                in_range = bool(((value >= minimum) & (value <= maximum)).all())
                return value.dtype.kind in "iu" and len(value) == layers and in_range
            return type(value) is int and minimum <= value <= maximum

        expected = f"an integer in [{minimum}, {maximum}] or an array of {layers} of them"
        value = self._get(key, _REQUIRED if default is None else default, is_valid, expected)
        return value.tolist() if isinstance(value, np.ndarray) else [value] * layers

    def _get(self, key: str, default: object, is_valid: Callable[[MetadataValue], bool], expected: str) -> Any:
        """The valid value of `key`, or the default. `Any`: a checker cannot see what `is_valid` saw."""
        if key not in self:
            if default is not _REQUIRED:
                return default
            raise WeightFileError(self.field(key), None, f"is missing; expected {expected}")
        value = self[key]
        if not is_valid(value):
            raise WeightFileError(self.field(key), _summary(value), f"must be {expected}")
        return value


def _counted(length: int | None) -> str:
    return "" if length is None else f"{length} "


def _summary(value: MetadataValue) -> Any:
    """A value as an error shows it: an array by its kind and length."""
    if isinstance(value, np.ndarray):
        return f"array of {len(value)} {value.dtype.name}"
    return f"array of {len(value)}" if isinstance(value, list) else value
