"""How many threads work on files at once. Imports no JAX."""

from atoma_jax.cores import usable_cores
from atoma_jax.errors import ConfigError

MOST = 256


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
