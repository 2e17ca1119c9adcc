"""What a layer does to each row of activations by itself: norms, heads, activations with gates. All in float32.

Native kernels where the backend asks for them; elsewhere XLA, which fuses these with what is around them. What products
take in themselves is `pending.py`'s.
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


def rotated_heads(
    qkv: Float32[Array, "T C"],
    cos: Float32[Array, "T half"],
    sin: Float32[Array, "T half"],
    backend: Backend,
    *,
    num_heads: int,
    num_kv_heads: int,
    norms: tuple[Float[Array, " H"], Float[Array, " H"]] | None,
    eps: float,
) -> tuple[Float32[Array, "T N H"], Float32[Array, "T K H"], Float32[Array, "T K H"]]:
    """Queries and keys, rotated (arXiv:2104.09864), and values, from what a projection makes of a step's tokens.

    Args:
        qkv: of each kv head its queries, its key, its value.
        cos: of each token's position. The first `half` numbers of a head rotate against the next; the rest stay.
        sin: likewise.
        backend: where it runs.
        num_heads: N, of queries.
        num_kv_heads: K.
        norms: scales of an RMS norm of each query and of each key, in front of the rotation.
        eps: of the norms.
    """
    N, K = num_heads, num_kv_heads
    T, width = qkv.shape
    H = width // (N + 2 * K)
    if backend.kernels == "native":
        scales = None if norms is None else (norms[0].astype(jnp.float32), norms[1].astype(jnp.float32))
        heads = {"num_heads": N, "num_kv_heads": K}
        return native_rowwise.rotated_heads(qkv, cos, sin, **heads, norms=scales, eps=eps)
    grouped = qkv.reshape(T, K, N // K + 2, H)
    q, k, v = grouped[:, :, :-2].reshape(T, N, H), grouped[:, :, -2], grouped[:, :, -1]
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps, backend), rms_norm(k, norms[1], eps, backend)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _rotate(
    x: Float32[Array, "T n H"], cos: Float32[Array, "T half"], sin: Float32[Array, "T half"]
) -> Float32[Array, "T n H"]:
    cos, sin, half = cos[:, None], sin[:, None], cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def gated(gate_up: Float32[Array, "*lead twoF"], activation: Activation, backend: Backend) -> Float32[Array, "*lead F"]:
    """activation(gate) · up (arXiv:2002.05202), gate in the first half."""
    if backend.kernels == "native":
        *lead, width = gate_up.shape
        return native_rowwise.gated(gate_up.reshape(-1, width), activation).reshape(*lead, width // 2)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return activated(gate, activation) * up


def activated(gate: Float32[Array, "*n"], activation: Activation) -> Float32[Array, "*n"]:
    """What gates become."""
    if activation == "silu":
        return jax.nn.silu(gate)
    if activation == "gelu_tanh":
        return jax.nn.gelu(gate, approximate=True)
    return jnp.square(jax.nn.relu(gate))
