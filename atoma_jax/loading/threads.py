"""How many threads work on files at once. Imports no JAX."""

import os

from atoma_jax.errors import ConfigError

MOST = 256


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def checked_threads(threads: int | None) -> int:
    """The number that a user asked for, or one a core.

    Raises:
        ConfigError: it is outside its limits.
    """
    if threads is None:
        return usable_cores()
    if not 1 <= threads <= MOST:
        raise ConfigError("threads", threads, f"must be in [1, {MOST}]")
    return threads
