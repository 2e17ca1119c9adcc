"""Pieces that decoders share: normalization, rotary positions, activations. All in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from atoma_jax.model_spec import Activation, ModelSpec, RopeSpec
from sharding.collectives import mean_over
from sharding.mesh import MeshShape


class Rope(NamedTuple):
    """Cosines and sines of a step's positions, for layers that see everything and for layers with a window."""

    cos: Float32[Array, "2 T half"]
    sin: Float32[Array, "2 T half"]

    @property
    def tokens(self) -> int:
        """T, of the whole step."""
        return self.cos.shape[1]


def rms_norm(
    x: Float32[Array, "*lead D"], scale: Float[Array, " D"], eps: float, *, cut_over: MeshShape | None = None
) -> Float32[Array, "*lead D"]:
    """Root-mean-square normalization (arXiv:1910.07467); `cut_over`: a mesh over whose `tensor` axis D is cut."""
    square = mean_over(jnp.mean(x * x, axis=-1, keepdims=True), cut_over, "tensor")
    return x * jax.lax.rsqrt(square + eps) * scale


def rope_tables(positions: Int32[Array, " T"], spec: RopeSpec) -> Rope:
    """Rotary embedding (arXiv:2104.09864) of each position of its sequence."""
    everywhere = np.asarray(spec.frequencies, np.float32)
    local = everywhere if spec.local_frequencies is None else np.asarray(spec.local_frequencies, np.float32)
    angles = positions.astype(jnp.float32)[None, :, None] * np.stack([everywhere, local])[:, None]  # [2, T, half]
    magnitude = np.asarray([spec.magnitude, 1.0 if spec.local_frequencies else spec.magnitude], np.float32)
    return Rope(jnp.cos(angles) * magnitude[:, None, None], jnp.sin(angles) * magnitude[:, None, None])


def rotate(x: Float32[Array, "T n H"], rope: Rope, windowed: Bool[Array, ""]) -> Float32[Array, "T n H"]:
    """Rotates the first half of each head's rotated dimensions against their second half; the rest stays."""
    cos, sin = (table[windowed.astype(jnp.int32)][:, None] for table in rope)  # [T, 1, half]
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def gated(gate_up: Float32[Array, "T twoF"], activation: Activation) -> Float32[Array, "T F"]:
    """activation(gate) · up (arXiv:2002.05202), gate in the first half."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    if activation == "silu":
        return jax.nn.silu(gate) * up
    if activation == "gelu_tanh":
        return jax.nn.gelu(gate, approximate=True) * up
    return jnp.square(jax.nn.relu(gate)) * up


def softcapped(logits: Float32[Array, "B V"], limit: float | None) -> Float32[Array, "B V"]:
    """limit · tanh(logits / limit)."""
    return logits if limit is None else limit * jnp.tanh(logits / limit)


def window_sizes(spec: ModelSpec) -> np.ndarray:
    """int32 [L]: tokens that each layer looks back; more than any context where it sees everything."""
    unlimited = np.iinfo(np.int32).max // 2  # sums with a position must not wrap
    windows = spec.windows or (None,) * spec.num_layers
    return np.asarray([unlimited if window is None else window for window in windows], np.int32)
