"""Hugging Face repositories: which of their files make a model, fetched through huggingface_hub.

Owns the choice of files. Weights come as safetensors or GGUF alone: pickled weights and code are never asked for.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from atoma_jax.errors import DownloadError, ModelNotFoundError
from atoma_jax.loading.fetch.catalog import HubSource

_LAYOUT = ["*.safetensors", "*.json", "*.model", "*.jinja"]  # everything a folder in HF layout needs, and nothing else
_WEIGHTS = ["config.json", "*.safetensors", "*.gguf"]  # what tells one kind of repository from another
_SPLIT = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


class _Silent(tqdm):
    """A progress bar that shows nothing; huggingface_hub takes a class and no switch."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "disable": True})


def first_of_split(names: Sequence[str]) -> list[str]:
    """The names that stand for a GGUF model each: of a split file only the first part."""
    return [name for name in names if not _SPLIT.fullmatch(name) or "-00001-of-" in name]


def download_file(source: HubSource, folder: Path, *, progress: bool) -> Path:
    """One file of a repository, below `folder`; goes on where an earlier try stopped.

    Raises:
        DownloadError: the hub cannot be reached or has no such file.
    """
    root = _snapshot(source.repo, source.revision, [source.file], local_dir=folder, download=True, progress=progress)
    path = root / source.file
    if not path.is_file():
        raise DownloadError(f"The hub's repository {source.repo} at {source.revision} has no file {source.file}.")
    return path


def download_snapshot(
    repo: str, file: str | None, *, revision: str | None, cache_dir: Path | None, download: bool, progress: bool
) -> Path:
    """A whole model of the hub: the path of `file` (the first part where it is split), or the repository's folder.

    Args:
        repo: "organization/name".
        file: a .gguf of the repository; None for its safetensors, or its GGUF file where it has just one.
        revision: branch, tag or commit; None for the hub's default.
        cache_dir: None for huggingface_hub's own cache, shared with the user's other programs.
        download: False looks into the cache alone.
        progress: whether a bar is shown.

    Raises:
        DownloadError: the hub cannot be reached, or refuses.
        ModelNotFoundError: the repository holds no model in a form that can be read.
    """
    if file is None and download:
        file = _choose(repo, revision, cache_dir)
    if file is None:
        patterns = _LAYOUT
    else:
        split = _SPLIT.fullmatch(file)
        patterns = [f"{split[1]}-?????-of-{split[2]}.gguf"] if split else [file]
    root = _snapshot(repo, revision, patterns, cache_dir=cache_dir, download=download, progress=progress)
    if file is None:
        return root
    path = root / file
    if not path.is_file():
        raise ModelNotFoundError("model", f"{repo}/{file}", f"{repo} at {revision or 'main'} has no such file")
    return path


def _choose(repo: str, revision: str | None, cache_dir: Path | None) -> str | None:
    """The one GGUF of a repository; None for HF layout, or where the hub does not answer and the cache may."""
    from huggingface_hub import snapshot_download  # 0.3 s to import: not for those who load a local file
    from huggingface_hub.errors import DryRunError

    try:
        listed = snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=_WEIGHTS,
            dry_run=True,
        )
    except DryRunError:  # the hub does not answer: an earlier download may still be in its cache
        return None
    except Exception as error:  # huggingface_hub's own, httpx's and OSError have no common base
        raise _unreachable(repo, revision, cache_dir, error) from error
    names = [info.filename for info in listed]
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return None
    ggufs = first_of_split(sorted(name for name in names if name.endswith(".gguf")))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        raise ModelNotFoundError(
            "model",
            repo,
            f"must name one file, {repo}:FILE, of its {len(ggufs)} GGUF files {', '.join(ggufs[:40])}",
        )
    raise ModelNotFoundError(
        "model",
        repo,
        "must hold config.json with *.safetensors, or a *.gguf; pickled weights are never read",
    )


def _snapshot(
    repo: str,
    revision: str | None,
    patterns: list[str],
    *,
    cache_dir: Path | None = None,
    local_dir: Path | None = None,
    download: bool,
    progress: bool,
) -> Path:
    from huggingface_hub import snapshot_download  # see _choose

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=patterns,
                cache_dir=cache_dir,
                local_dir=local_dir,
                local_files_only=not download,
                tqdm_class=None if progress else _Silent,
            )
        )
    except Exception as error:  # see _choose
        raise _unreachable(repo, revision, cache_dir, error) from error


def _unreachable(repo: str, revision: str | None, cache_dir: Path | None, error: Exception) -> DownloadError:
    return DownloadError(
        f"{repo} at {revision or 'its default revision'} is not in {cache_dir or 'the cache of huggingface_hub'} "
        f"and could not be fetched from the hub: {error}"
    )
