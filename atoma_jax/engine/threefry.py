"""Threefry-2x32, the counter-based generator behind `jax.random`, for a batch of keys at once.

Spelled out because the library's form rolls its rounds into loops on the CPU, which compiles four times slower, and so
that a seed gives the same tokens under every version and configuration of JAX.
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry_2x32(
    key: tuple[UInt32[Array, " B"], UInt32[Array, " B"]], counter: tuple[UInt32[Array, " B"], UInt32[Array, " B"]]
) -> tuple[UInt32[Array, " B"], UInt32[Array, " B"]]:
    """64 random bits for each pair of a 64-bit key and a 64-bit counter.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; 20 rounds.
    """
    schedule = (*key, key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = counter[0] + schedule[0], counter[1] + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = ((y << rotation) | (y >> (32 - rotation))) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y
