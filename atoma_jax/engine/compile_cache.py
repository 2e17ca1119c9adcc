"""The folder that compiled programs are kept in, for the next start."""

from pathlib import Path

import jax

from atoma_jax.errors import ConfigError


def use_compile_cache(folder: str | None) -> None:
    """Keeps the programs that this process compiles in a folder, if one is given.

    Raises:
        ConfigError: it cannot be made.
    """
    if folder is None:
        return
    try:
        Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("compile_cache_dir", folder, f"cannot be made: {error.strerror}") from error
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
