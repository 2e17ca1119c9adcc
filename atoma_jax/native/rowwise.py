"""Typed calls of the kernels for each row of activations by itself (`src/rowwise.h`): norms, activations with gates."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from atoma_jax.model_spec import Activation

_ACTIVATIONS: Final[Mapping[Activation, int]] = MappingProxyType({"silu": 0, "gelu_tanh": 1, "relu_squared": 2})


def rms_norm(x: Float32[Array, "R D"], scale: Float32[Array, " D"], eps: float) -> Float32[Array, "R D"]:
    """x · scale / √(mean of x² + eps), of each row by itself."""
    return jax.ffi.ffi_call("atoma_rms_norm", jax.ShapeDtypeStruct(x.shape, jnp.float32))(x, scale, eps=np.float32(eps))


def gated(gate_up: Float32[Array, "R twoF"], activation: Activation) -> Float32[Array, "R F"]:
    """activation(gate) · up, of each row by itself, gates in the first half."""
    rows, width = gate_up.shape
    call = jax.ffi.ffi_call("atoma_gated", jax.ShapeDtypeStruct((rows, width // 2), jnp.float32))
    return call(gate_up, activation=np.int64(_ACTIVATIONS[activation]))
