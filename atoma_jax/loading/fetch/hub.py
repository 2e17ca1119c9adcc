"""From what a user calls a model to a file or folder on this machine: path, catalogue name or hub id, in this order.

Owns the order, the check of names and the trust in folders. Reading the file found is the parsers' job; the bytes are
brought by `sources.py` and `snapshots.py`.
"""

import difflib
import logging
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from atoma_jax.errors import ConfigError, DownloadError, ModelNotFoundError
from atoma_jax.loading.fetch.catalog import CatalogEntry, load_catalog
from atoma_jax.loading.fetch.snapshots import download_snapshot, first_of_split
from atoma_jax.loading.fetch.sources import exclusive, fetch, sha256_of

_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB_ID = re.compile(rf"(?P<repo>{_SEGMENT}/{_SEGMENT})(?:[:/](?P<file>{_SEGMENT}(?:/{_SEGMENT}){{0,3}}\.gguf))?")

_REVISION = re.compile(r"\w[\w./-]{0,127}", re.ASCII)
_MODEL_SUFFIXES = (".gguf", ".safetensors", ".json", ".model")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A model that is on this machine."""

    name: str  # as the user called it
    path: Path  # a .gguf file (the first part of a split one), or a folder in HF layout or of `atoma-jax convert`
    kind: Literal["gguf", "folder", "orbax"]


def resolve(
    model: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    download: bool = True,
    verify: bool = False,
    progress: bool = True,
) -> ResolvedModel:
    """Finds a model, fetching it where need be.

    Args:
        model: a .gguf file; a folder with one, in HF layout, or of `atoma-jax convert`; a name of configs/models; a hub
            id `org/name`, `org/name:file.gguf` or `org/name/file.gguf`.
        revision: branch, tag or commit, for hub ids alone.
        cache_dir: where fetched models are kept; None for the user's cache folder (XDG), and for hub ids the hub's own.
        download: False uses only what is on this machine.
        verify: also checks the sha256 of a file that is in the cache already, about a second per GB.
        progress: shows a bar on standard error where that is a terminal.

    Raises:
        ModelNotFoundError: nothing answers to the name, or a folder holds no model; lists what was looked for.
        DownloadError: the model is known but is not here and could not be fetched.
        ConfigError: a revision for something that has none, or a folder that others may write to.
    """
    local = _local(model)
    if local is not None:
        _refuse_revision(revision, model, "a file or folder")
        return local
    catalog = load_catalog()
    if model in catalog:
        _refuse_revision(revision, model, "a model of the catalogue, pinned by its checksum,")
        root = _private_folder((cache_dir or default_cache_dir()) / "models", create=download)
        path = _cached(catalog[model], root, download=download, verify=verify, progress=progress)
        return ResolvedModel(name=model, path=path, kind="gguf")
    match = _HUB_ID.fullmatch(model)
    # "models/x.gguf" is a mistyped path, not an organization called models.
    if match is None or ".." in model or (match["file"] is None and model.endswith(".gguf")):
        raise _not_found(model, catalog)
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ConfigError("revision", revision, "must be a branch, tag or commit of the hub")
    hub_cache = None if cache_dir is None else _private_folder(cache_dir / "hub", create=download)
    path = download_snapshot(
        match["repo"], match["file"], revision=revision, cache_dir=hub_cache, download=download, progress=progress
    )
    return _in_folder(model, path) if path.is_dir() else _as_file(model, path)


def default_cache_dir() -> Path:
    """Where models are kept unless told otherwise: `$XDG_CACHE_HOME/atoma-jax` on Linux."""
    return platformdirs.user_cache_path("atoma-jax")


# Local files and folders


def _local(model: str) -> ResolvedModel | None:
    """The model at a path; None where nothing is."""
    if not model.strip() or "\0" in model:
        raise ModelNotFoundError("model", model, "must be a path, a name or a hub id")
    path = Path(model).expanduser()
    try:
        mode = path.stat().st_mode
    except OSError:  # absent, behind a closed folder, or too long to be a path
        return None
    if stat.S_ISDIR(mode):
        return _in_folder(model, path)
    if not stat.S_ISREG(mode) or path.suffix != ".gguf":
        raise ModelNotFoundError(
            "model", model, "must be a .gguf file or a folder; pickled weights (.bin, .pt, .pkl) are never read"
        )
    return _as_file(model, path)


def _as_file(model: str, path: Path) -> ResolvedModel:
    real = path.resolve()
    _refuse_world_writable(real.parent, sticky_is_safe=True)
    _refuse_world_writable(real, sticky_is_safe=False)
    return ResolvedModel(name=model, path=path, kind="gguf")


def _in_folder(model: str, folder: Path) -> ResolvedModel:
    """The one model of a folder: in HF layout, as `atoma-jax convert` writes it, or its only GGUF file."""
    _refuse_world_writable(folder, sticky_is_safe=False)
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in _MODEL_SUFFIXES)
    except OSError as error:
        raise ModelNotFoundError("model", model, f"the folder cannot be read ({error.strerror})") from error
    for path in files:
        _refuse_escape(path, folder)
    names = [path.name for path in files]
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return ResolvedModel(name=model, path=folder, kind="folder")
    if "model.json" in names and (folder / "weights").is_dir():
        _refuse_escape(folder / "weights", folder)
        return ResolvedModel(name=model, path=folder, kind="orbax")
    ggufs = first_of_split([name for name in names if name.endswith(".gguf")])
    if len(ggufs) == 1:
        return ResolvedModel(name=model, path=folder / ggufs[0], kind="gguf")
    looked = (
        "model.json with weights/ (of `atoma-jax convert`), config.json with *.safetensors, or exactly one *.gguf "
        "(or one split as *-00001-of-*.gguf)"
    )
    if ggufs:
        raise ModelNotFoundError(
            "model",
            model,
            f"must be one of the folder's {len(ggufs)} GGUF files: {', '.join(ggufs[:40])}",
        )
    raise ModelNotFoundError("model", model, f"the folder holds no model; looked for {looked}")


def _refuse_escape(path: Path, folder: Path) -> None:
    """A link in a model's folder must not lead out of it, so that a downloaded folder cannot show other files."""
    root = folder.resolve()
    if root.parent.name == "snapshots":  # the hub's cache links snapshots/REVISION/* to blobs/*
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise ConfigError("model", str(path), f"is a link that leads out of {root}; replace it by the file itself")


def _refuse_world_writable(path: Path, *, sticky_is_safe: bool) -> None:
    """Another user of the machine could replace the weights, or change them while they are mapped.

    Args:
        path: an existing file or folder.
        sticky_is_safe: a sticky folder such as /tmp lets others add files, yet not touch one that is named already.
    """
    mode = path.stat().st_mode
    if mode & stat.S_IWOTH and not (sticky_is_safe and mode & stat.S_ISVTX):
        raise ConfigError(
            "model", str(path), f"must not be writable by every user of this machine; run `chmod o-w {path}`"
        )


# The cache


def _private_folder(folder: Path, *, create: bool) -> Path:
    """A folder of the cache, made where it is missing; refused where others may write to it or to the one above."""
    try:
        if create:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"Models cannot be kept in {folder}: {error}. Name another folder with --cache-dir."
        ) from error
    for level in (folder, folder.parent):
        if level.exists():
            _refuse_world_writable(level, sticky_is_safe=level != folder)
    return folder


def _cached(entry: CatalogEntry, root: Path, *, download: bool, verify: bool, progress: bool) -> Path:
    """The file of a catalogue entry, whole. A file in the cache is trusted by its size: it was moved there verified."""
    folder = root / entry.name
    target = folder / entry.file
    if folder.is_symlink() or target.is_symlink():
        raise ConfigError("cache_dir", str(target), "must hold folders and files, not links; remove the link")
    if not download:
        if not _is_whole(entry, target, verify=verify):
            raise DownloadError(f"{entry.name} is not at {target}; fetch it with `atoma-jax pull {entry.name}`.")
        return target
    _private_folder(folder, create=True)
    if _is_whole(entry, target, verify=verify):
        return target
    with exclusive(target):
        if not _is_whole(entry, target, verify=verify):  # else another process brought it meanwhile
            if target.exists():
                _log.warning("%s is not the expected file any more; fetching it again", target)
            fetch(entry, target, progress=progress)
    return target


def _is_whole(entry: CatalogEntry, target: Path, *, verify: bool) -> bool:
    if not target.is_file() or target.stat().st_size != entry.size:
        return False
    return not verify or sha256_of(target) == entry.sha256


# Errors


def _refuse_revision(revision: str | None, model: str, what: str) -> None:
    if revision is not None:
        raise ConfigError("revision", revision, f"{model} is {what} which has no revisions; leave it out")


def _not_found(model: str, catalog: dict[str, CatalogEntry]) -> ModelNotFoundError:
    near = difflib.get_close_matches(model, catalog, n=1)
    hint = f"; did you mean {near[0]}" if near else ""
    return ModelNotFoundError(
        "model",
        model,
        f"must be a .gguf file or a folder (looked in {Path.cwd()}), a name of the catalogue ({', '.join(catalog)}) "
        f"or a hub id (org/name, org/name:file.gguf){hint}",
    )
