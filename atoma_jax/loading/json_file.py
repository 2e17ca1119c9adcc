"""Bounded reading of a model's small JSON files, and checked access to their values.

Owns limits and types of single values, as `gguf/metadata.py` does for GGUF. Knows no key by name.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from atoma_jax.errors import ModelNotFoundError, UnsupportedModelError, WeightFileError

MAX_BYTES = 1 << 20  # a published config has a tenth; what a hostile one costs to parse is about thirty times its size

Json: TypeAlias = dict[str, Any]
_Choice = TypeVar("_Choice", str, int)


def read_json(path: Path) -> Json:
    """The object in a file.

    Raises:
        ModelNotFoundError: the file is missing or cannot be read.
        WeightFileError: it is too large, or no JSON object.
    """
    try:
        if not path.is_file():
            raise ModelNotFoundError("model", str(path), "there is no such file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ModelNotFoundError("model", str(path), f"cannot be read ({error})") from error
    if len(content) > MAX_BYTES:
        raise WeightFileError(f"{path}: size", "more", f"must be at most {MAX_BYTES} bytes")
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise WeightFileError(f"{path}: content", content[:40], f"must be JSON in UTF-8 ({error})") from error
    if not isinstance(values, dict):
        raise WeightFileError(f"{path}: content", content[:40], "must be a JSON object")
    return values


class Section:
    """An object of a JSON file whose values are checked when they are taken. A null counts as missing."""

    def __init__(self, where: str, values: Mapping[str, Any]):
        """`where` names file and object: "…/config.json: quantization_config"."""
        self.where = where
        self.values = values

    def field(self, key: str) -> str:
        """The name of a value, for errors."""
        return f"{self.where}.{key}"

    def __contains__(self, key: object) -> bool:
        """Whether there is a value."""
        return self.values.get(key) is not None  # type: ignore[arg-type]

    def integer(self, key: str, default: int | None = None, *, minimum: int = 0, maximum: int = 2**31 - 1) -> int:
        """A whole number in the limits, both included."""
        value = self._get(key, default)
        if type(value) is not int or not minimum <= value <= maximum:
            raise WeightFileError(self.field(key), value, f"must be a whole number in [{minimum}, {maximum}]")
        return value

    def number(self, key: str, default: float | None = None, *, minimum: float = -1e30, maximum: float = 1e30) -> float:
        """A number in the limits, both included."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not minimum <= value <= maximum:  # not met by NaN
            raise WeightFileError(self.field(key), value, f"must be a number in [{minimum:g}, {maximum:g}]")
        return float(value)

    def numbers(self, key: str, count: int, *, minimum: float = -1e30, maximum: float = 1e30) -> tuple[float, ...]:
        """A list of so many numbers in the limits."""
        value = self._get(key, None)
        fits = isinstance(value, list) and len(value) == count
        if not fits or not all(type(item) in (int, float) and minimum <= item <= maximum for item in value):
            limits = f"must be a list of {count} numbers in [{minimum:g}, {maximum:g}]"
            raise WeightFileError(self.field(key), value, limits)
        return tuple(float(item) for item in value)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise WeightFileError(self.field(key), value, "must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise WeightFileError(self.field(key), value, "must be a string")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings, none where it is missing."""
        value = self._get(key, ())
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise WeightFileError(self.field(key), value, "must be a list of strings")
        return tuple(value)

    def choice(self, key: str, default: _Choice, implemented: Collection[_Choice]) -> _Choice:
        """One of the values that are implemented; strings in lower case."""
        value = self.values.get(key)
        value = default if value is None else value
        value = value.lower() if isinstance(value, str) else value
        if type(value) is not type(default) or value not in implemented:
            problem = f"is not implemented; those that are: {', '.join(map(str, implemented))}"
            raise UnsupportedModelError(self.field(key), value, problem)
        return value

    def section(self, key: str) -> "Section":
        """An object, empty where it is missing."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise WeightFileError(self.field(key), value, "must be an object")
        return Section(self.field(key), value)

    def refuse(self, key: str, problem: str) -> None:
        """Raises UnsupportedModelError where a value says something: it is neither null, false nor empty."""
        if self.values.get(key):
            raise UnsupportedModelError(self.field(key), self.values[key], problem)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise WeightFileError(self.field(key), None, "is missing")
        return default
