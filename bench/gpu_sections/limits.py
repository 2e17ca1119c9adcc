"""What the device can do at best: bytes a second of a copy, bfloat16 operations a second of a product."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from bench.gpu_sections.protocol import Context, Measurement
from bench.gpu_sections.timing import seconds_a_turn

COPY, PRODUCT = "copy", "bf16 product"  # names that the driver looks for


def measure(context: Context) -> Iterator[Measurement]:
    """Both limits."""
    words = 1 << (16 if context.small else 29)
    x = jnp.ones((words,), jnp.float32)
    seconds = seconds_a_turn(lambda x: x * 1.0000001, x, turns=2 if context.small else 20)
    yield Measurement(name=COPY, seconds=seconds, moved_bytes=2 * x.nbytes)
    n = 128 if context.small else 8192
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    b = a.T / n**0.5
    seconds = seconds_a_turn(lambda a, b: jnp.dot(a, b), a, b, turns=2 if context.small else 20)
    yield Measurement(name=PRODUCT, seconds=seconds, operations=2 * n**3)
