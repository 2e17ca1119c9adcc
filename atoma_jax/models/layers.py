"""Pieces that decoders share: normalization, rotary positions, activations. All in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from atoma_jax.model_spec import ModelSpec


class Rope(NamedTuple):
    """Cosines and sines of a step's positions, for layers that see everything and for layers with a window."""

    cos: Float32[Array, "2 T half"]
    sin: Float32[Array, "2 T half"]


def rms_norm(x: Float32[Array, "*lead D"], scale: Float[Array, " D"], eps: float) -> Float32[Array, "*lead D"]:
    """Root-mean-square normalization (arXiv:1910.07467)."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rope_tables(positions: Int32[Array, " T"], spec: ModelSpec, divisors: Float[Array, " half"] | None) -> Rope:
    """Rotary embedding (arXiv:2104.09864) of each position.

    Args:
        positions: in each token's sequence.
        spec: the model's bases and scaling.
        divisors: of the frequencies, for models that bring them; they apply to layers without a window alone.
    """
    half = spec.head_dim // 2
    exponents = np.arange(half, dtype=np.float64) / half
    everywhere = jnp.asarray(spec.rope_theta**-exponents / spec.rope_factor, jnp.float32)
    if divisors is not None:
        everywhere = everywhere / divisors
    local = everywhere
    if spec.local_rope_theta is not None:
        local = jnp.asarray(spec.local_rope_theta**-exponents, jnp.float32)
    angles = positions.astype(jnp.float32)[None, :, None] * jnp.stack([everywhere, local])[:, None]  # [2, T, H/2]
    return Rope(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float32[Array, "T n H"], rope: Rope, windowed: Bool[Array, ""]) -> Float32[Array, "T n H"]:
    """Rotates the first half of each head against its second half."""
    cos, sin = (table[windowed.astype(jnp.int32)][:, None] for table in rope)  # [T, 1, H/2]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def gated(gate_up: Float32[Array, "T twoF"], activation: str) -> Float32[Array, "T F"]:
    """activation(gate) · up (arXiv:2002.05202), gate in the first half."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return (jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)) * up


def softcapped(logits: Float32[Array, "B V"], limit: float | None) -> Float32[Array, "B V"]:
    """limit · tanh(logits / limit)."""
    return logits if limit is None else limit * jnp.tanh(logits / limit)


def window_sizes(spec: ModelSpec) -> np.ndarray:
    """int32 [L]: tokens that each layer looks back; more than any context where it sees everything."""
    unlimited = np.iinfo(np.int32).max // 2  # sums with a position must not wrap
    windows = spec.windows or (None,) * spec.num_layers
    return np.asarray([unlimited if window is None else window for window in windows], np.int32)
