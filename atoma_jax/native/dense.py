"""A typed call of the kernel for dense weights (`src/dense.h`)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


def matmul(
    x: Float32[Array, "T K"], stack: Float[Array, "*lead N K"], index: Int32[Array, ""]
) -> Float32[Array, "T N"]:
    """x · Wᵀ, summed in float32. A row depends on that row of `x` alone, bit for bit.

    Args:
        x: activations.
        stack: of matrices in float32, bfloat16 or float16, read in place: a slice would be copied before every call.
        index: of the matrix in it, leading axes flattened.
    """
    out = jax.ShapeDtypeStruct((x.shape[0], stack.shape[-2]), jnp.float32)
    return jax.ffi.ffi_call("atoma_dense", out)(x, stack, index)
