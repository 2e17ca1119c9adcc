"""How long a jitted function takes on the device, without the host's share."""

import time
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

REPEATS = 5


def seconds_a_turn(function: Callable[..., jax.Array], x: jax.Array, *rest: Any, turns: int) -> float:
    """Seconds of `function(x, *rest)`, the least of some loops of `turns` inside one program.

    Each turn's `x` depends on the turn before, so that none is moved out of the loop.
    """

    @jax.jit
    def loop(x: jax.Array, *rest: Any) -> jax.Array:
        def turn(_: Any, x: jax.Array) -> jax.Array:
            return x + (function(x, *rest).reshape(-1)[0] * 1e-30).astype(x.dtype)

        return lax.fori_loop(0, turns, turn, x)

    return seconds_of(loop, x, *rest) / turns


def seconds_of(function: Callable[..., Any], *arguments: Any) -> float:
    """The least seconds of some calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        best = min(best, time.perf_counter() - begin)
    return best
