"""The models known by name: configs/models/*.toml read into checked, frozen entries.

Owns the schema of those files. Fetches nothing (`sources.py`) and knows no models of other kinds (`hub.py`).
"""

import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from atoma_jax.errors import ConfigError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.gguf")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_MEMBER = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)
# Exact versions only: the checksum beside it belongs to one file, and a requirement is an argument of a command line.
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.+!_-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """One file of a Hugging Face repository at a revision (branch, tag or commit)."""

    repo: str
    file: str
    revision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlSource:
    """One file behind an https address."""

    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelPart:
    """A member of a wheel, `requirement` as pip takes it."""

    requirement: str
    member: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelSource:
    """A file inside a wheel, or cut over several: the parts are joined in order."""

    parts: tuple[WheelPart, ...]


Source = HubSource | UrlSource | WheelSource


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A model that has a name of its own."""

    name: str
    description: str
    licence: str
    licence_note: str | None  # shown when the model is fetched
    file: str  # name of the file in the cache
    size: int  # bytes
    sha256: str
    source: Source


def load_catalog() -> dict[str, CatalogEntry]:
    """Every entry of the installed configs/models, by name.

    Raises:
        ConfigError: a file breaks the schema; the message names file and key.
    """
    folder = resources.files("configs").joinpath("models")
    entries: dict[str, CatalogEntry] = {}
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.name.endswith(".toml"):
            entry = parse_entry(item.read_text(encoding="utf-8"), where=f"configs/models/{item.name}")
            if item.name != f"{entry.name}.toml":
                raise ConfigError(f"configs/models/{item.name}: name", entry.name, "must equal the file's name")
            entries[entry.name] = entry
    return entries


def parse_entry(text: str, *, where: str) -> CatalogEntry:
    """Reads one model file; `where` names it in errors.

    Raises:
        ConfigError: not TOML, or a key is missing, unknown, of the wrong type or outside its limits.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(where, str(error), "must be a TOML file") from error
    table = _Table(where, data)
    entry = CatalogEntry(
        name=table.text("name", _NAME),
        description=table.text("description"),
        licence=table.text("licence"),
        licence_note=table.text("licence_note") if "licence_note" in data else None,
        file=table.text("file", _FILE),
        size=table.positive("size"),
        sha256=table.text("sha256", _SHA256),
        source=_parse_source(table.table("source")),
    )
    table.finish()
    return entry


def _parse_source(table: "_Table") -> Source:
    kind = table.text("kind")
    source: Source
    if kind == "hub":
        source = HubSource(
            repo=table.text("repo", _REPO), file=table.text("file", _MEMBER), revision=table.text("revision", _MEMBER)
        )
    elif kind == "url":
        source = UrlSource(url=table.text("url", re.compile(r"https://\S+")))
    elif kind == "wheel":
        parts: list[WheelPart] = []
        for part in table.tables("parts"):
            parts.append(
                WheelPart(
                    requirement=part.text("requirement", _REQUIREMENT),
                    member=part.text("member", _MEMBER),
                )
            )
            part.finish()
        source = WheelSource(parts=tuple(parts))
    else:
        raise ConfigError(f"{table.where}.kind", kind, "must be one of hub, url, wheel")
    table.finish()
    return source


class _Table:
    """A TOML table read key by key, so that a missing, mistyped or unknown key is named."""

    def __init__(self, where: str, data: dict[str, Any]):
        self.where = where
        self._data = data
        self._read: set[str] = set()

    def _take(self, key: str) -> Any:
        if key not in self._data:
            raise ConfigError(f"{self.where}: {key}", None, "is required; add it")
        self._read.add(key)
        return self._data[key]

    def text(self, key: str, pattern: re.Pattern[str] | None = None) -> str:
        value = self._take(key)
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{self.where}: {key}", value, "must be a text that is not empty")
        if pattern is not None and (not pattern.fullmatch(value) or ".." in value):
            raise ConfigError(f"{self.where}: {key}", value, f"must match {pattern.pattern} and hold no '..'")
        return value

    def positive(self, key: str) -> int:
        value = self._take(key)
        if type(value) is not int or value < 1:  # bool is an int too
            raise ConfigError(f"{self.where}: {key}", value, "must be a whole number of at least 1")
        return value

    def table(self, key: str) -> "_Table":
        value = self._take(key)
        if not isinstance(value, dict):
            raise ConfigError(f"{self.where}: {key}", value, "must be a table")
        return _Table(f"{self.where}: {key}", value)

    def tables(self, key: str) -> "list[_Table]":
        value = self._take(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            raise ConfigError(f"{self.where}: {key}", value, "must be a list of tables, at least one")
        return [_Table(f"{self.where}: {key}[{index}]", item) for index, item in enumerate(value)]

    def finish(self) -> None:
        unknown = sorted(set(self._data) - self._read)
        if unknown:
            raise ConfigError(f"{self.where}: {unknown[0]}", self._data[unknown[0]], "is no known key; remove it")
