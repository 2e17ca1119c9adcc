"""What a layer does to each row of activations by itself: norms, and activations with gates. All in float32.

Native kernels where the backend asks for them; elsewhere XLA, which fuses these with what is around them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from atoma_jax.model_spec import Activation
from atoma_jax.native import rowwise as native_rowwise
from atoma_jax.ops.backend import Backend
from sharding.collectives import mean_over, size_of


def rms_norm(
    x: Float32[Array, "*lead D"], scale: Float[Array, " D"], eps: float, backend: Backend, *, is_cut: bool = False
) -> Float32[Array, "*lead D"]:
    """Root-mean-square normalization (arXiv:1910.07467); `is_cut`: D is cut over the mesh's `tensor` axis."""
    cut_over = backend.mesh if is_cut else None
    if backend.kernels == "native" and size_of(cut_over, "tensor") == 1:
        D = x.shape[-1]
        return native_rowwise.rms_norm(x.reshape(-1, D), scale.astype(jnp.float32), eps).reshape(x.shape)
    square = mean_over(jnp.mean(x * x, axis=-1, keepdims=True), cut_over, "tensor")
    return x * jax.lax.rsqrt(square + eps) * scale


def gated(gate_up: Float32[Array, "*lead twoF"], activation: Activation, backend: Backend) -> Float32[Array, "*lead F"]:
    """activation(gate) · up (arXiv:2002.05202), gate in the first half."""
    if backend.kernels == "native":
        *lead, width = gate_up.shape
        return native_rowwise.gated(gate_up.reshape(-1, width), activation).reshape(*lead, width // 2)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    if activation == "silu":
        return jax.nn.silu(gate) * up
    if activation == "gelu_tanh":
        return jax.nn.gelu(gate, approximate=True) * up
    return jnp.square(jax.nn.relu(gate)) * up
