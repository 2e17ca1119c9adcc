"""Typed calls of the kernels for each row of activations by itself (`src/rowwise.h`): norms, heads, gates."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from atoma_jax.model_spec import Activation

# Of `enum class Gate`.
GATES: Final[Mapping[Activation, int]] = MappingProxyType({"silu": 0, "gelu_tanh": 1, "relu_squared": 2})


def rms_norm(x: Float32[Array, "R D"], scale: Float32[Array, " D"], eps: float) -> Float32[Array, "R D"]:
    """x · scale / √(mean of x² + eps), of each row by itself."""
    return jax.ffi.ffi_call("atoma_rms_norm", jax.ShapeDtypeStruct(x.shape, jnp.float32))(x, scale, eps=np.float32(eps))


def rotated_heads(
    qkv: Float32[Array, "T C"],
    cos: Float32[Array, "T half"],
    sin: Float32[Array, "T half"],
    *,
    num_heads: int,
    num_kv_heads: int,
    norms: tuple[Float32[Array, " H"], Float32[Array, " H"]] | None,
    eps: float,
) -> tuple[Float32[Array, "T N H"], Float32[Array, "T K H"], Float32[Array, "T K H"]]:
    """Queries and keys, rotated, and values, from what a projection makes of tokens.

    Args:
        qkv: of each kv head its queries, its key, its value.
        cos: of each token, for the pairs of numbers that rotate: the first `half` of a head against the next.
        sin: likewise.
        num_heads: N, of queries.
        num_kv_heads: K.
        norms: scales of a norm of each query and of each key in front of the rotation.
        eps: of the norms.
    """
    T, width = qkv.shape
    H = width // (num_heads + 2 * num_kv_heads)
    shapes = [jax.ShapeDtypeStruct((T, heads, H), jnp.float32) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    q_scale, k_scale = norms or (jnp.zeros(0, jnp.float32),) * 2
    q, k, v = jax.ffi.ffi_call("atoma_rotate_heads", shapes)(qkv, cos, sin, q_scale, k_scale, eps=np.float32(eps))
    return q, k, v


def gated(gate_up: Float32[Array, "R twoF"], activation: Activation) -> Float32[Array, "R F"]:
    """activation(gate) · up, of each row by itself, gates in the first half."""
    rows, width = gate_up.shape
    call = jax.ffi.ffi_call("atoma_gated", jax.ShapeDtypeStruct((rows, width // 2), jnp.float32))
    return call(gate_up, activation=np.int64(GATES[activation]))
