"""A typed call of the kernel for dense weights (`src/dense.h`)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32


def matmul(
    x: Float32[Array, "T K"], stack: Float[Array, "*lead N K"], index: Int32[Array, ""], *, may_round: bool
) -> Float32[Array, "T N"]:
    """x · Wᵀ, summed in float32. A row depends on that row of `x` alone, bit for bit.

    Args:
        x: activations.
        stack: of matrices in float32, bfloat16 or float16, read in place: a slice would be copied before every call.
        index: of the matrix in it, leading axes flattened.
        may_round: `x` to bfloat16, where the stack is of that type and the CPU has instructions for products of it.
    """
    out = jax.ShapeDtypeStruct((x.shape[0], stack.shape[-2]), jnp.float32)
    return jax.ffi.ffi_call("atoma_dense", out)(x, stack, index, may_round=np.bool_(may_round))
