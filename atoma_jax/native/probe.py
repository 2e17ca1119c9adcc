"""The smallest call: what kernels run with, as a program sees it. For tests and reports."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32


def probe() -> Int32[Array, "2"]:
    """The variant, as an index of `library.VARIANTS`, and the number of threads. The library must be loaded."""
    return jax.ffi.ffi_call("atoma_probe", jax.ShapeDtypeStruct((2,), jnp.int32))()
