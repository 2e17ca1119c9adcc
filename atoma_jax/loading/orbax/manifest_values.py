"""Checked access to the kinds of values that `model.json` has and a model's published JSON files have not."""

from collections.abc import Callable, Collection
from typing import Any, TypeVar

from atoma_jax.errors import WeightFileError
from atoma_jax.loading.json_file import Section

_Value = TypeVar("_Value")


def known_keys(section: Section, keys: Collection[str]) -> None:
    """Refuses keys that a reader does not know: whoever wrote them meant something by them."""
    unknown = sorted(set(section.values) - set(keys))
    if unknown:
        raise WeightFileError(section.field(unknown[0]), section.values[unknown[0]], "is no key of this format")


def choice(section: Section, key: str, choices: Collection[str]) -> Any:
    """One of some strings; `Any`, as a caller's Literal says which."""
    value = section.text(key)
    if value not in choices:
        raise WeightFileError(section.field(key), value, f"must be one of {', '.join(choices)}")
    return value


def numbers(section: Section, key: str, *, longest: int) -> tuple[float, ...]:
    """A list of 1 to `longest` numbers, none below zero."""
    values = _list(section, key, longest)
    if not values:
        raise WeightFileError(section.field(key), values, "must not be empty")
    return section.numbers(key, len(values), minimum=0.0)


def integers(section: Section, key: str, *, longest: int, minimum: int, maximum: int) -> tuple[int, ...]:
    """A list of up to `longest` whole numbers in the limits, both included."""
    values = _list(section, key, longest)
    for value in values:
        if type(value) is not int or not minimum <= value <= maximum:
            raise WeightFileError(section.field(key), value, f"must be whole numbers in [{minimum}, {maximum}]")
    return tuple(values)


def optional(section: Section, key: str, read: Callable[[str], _Value]) -> _Value | None:
    """What `read` makes of a value; None where it is null or missing."""
    return None if section.values.get(key) is None else read(key)


def _list(section: Section, key: str, longest: int) -> list[Any]:
    value = section.values.get(key)
    if not isinstance(value, list) or len(value) > longest:
        raise WeightFileError(section.field(key), value, f"must be a list of at most {longest}")
    return value
