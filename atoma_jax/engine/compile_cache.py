"""The folder that compiled programs are kept in, for the next start."""

import stat
from pathlib import Path

import jax

from atoma_jax.errors import ConfigError


def use_compile_cache(folder: str | None) -> None:
    """Keeps the programs that this process compiles in a folder, if one is given.

    Raises:
        ConfigError: it cannot be made, or every user of this machine may write to it.
    """
    if folder is None:
        return
    try:
        Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("compile_cache_dir", folder, f"cannot be made: {error.strerror}") from error
    _refuse_world_writable(folder)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _refuse_world_writable(folder: str) -> None:
    """Programs are machine code: who writes them runs code as this user. A sticky folder lets others add files, which
    is enough here; above it, they could only add folders of other names."""
    path = Path(folder).resolve()
    for place, sticky_is_safe in ((path, False), (path.parent, True)):
        mode = place.stat().st_mode
        if mode & stat.S_IWOTH and not (sticky_is_safe and mode & stat.S_ISVTX):
            problem = f"must not be writable by every user of this machine; run `chmod o-w {place}`"
            raise ConfigError("compile_cache_dir", str(place), problem)
