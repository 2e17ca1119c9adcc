"""Products with bfloat16 weights that lie in a stack of layers, as a Pallas kernel for NVIDIA GPUs.

XLA copies a layer's weight out of its stack before it multiplies, which triples what a step of few rows moves. Here the
index is an operand, as in `planar_matmul.py`. The reference is `quantized_matmul.dot`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels.tuning import DENSE_BLOCK, MatmulTiles


def dense_matmul(
    x: BFloat16[Array, "M K"],
    stack: BFloat16[Array, "S N K"],
    index: Int32[Array, ""],
    tiles: MatmulTiles,
    *,
    interpret: bool = False,
) -> Float32[Array, "splits M N"]:
    """x · Wᵀ for W = stack[index], as parts to be added up; sums are float32.

    Args:
        x: activations.
        stack: weights.
        index: which.
        tiles: how the product is cut.
        interpret: run the kernel's steps as plain JAX, on any device.
    """
    (M, K), N = x.shape, stack.shape[1]
    whole = -(-K // DENSE_BLOCK)
    blocks = -(-whole // tiles.splits)
    splits = -(-whole // blocks)

    def kernel(index_ref: Any, x_ref: Any, stack_ref: Any, out_ref: Any) -> None:
        place, part = index_ref[0], pl.program_id(2)
        rows = pl.program_id(0) * tiles.block_m + lax.iota(jnp.int32, tiles.block_m)
        features = pl.program_id(1) * tiles.block_n + lax.iota(jnp.int32, tiles.block_n)

        def block(b: Any, total: Array) -> Array:
            inputs = b * DENSE_BLOCK + lax.iota(jnp.int32, DENSE_BLOCK)
            inside = (inputs < K)[None, :]
            zero = np.zeros((), jnp.bfloat16)[()]
            weights = plt.load(
                stack_ref.at[place, features[:, None], inputs[None, :]],
                mask=(features < N)[:, None] & inside,
                other=zero,
            )
            x = plt.load(x_ref.at[rows[:, None], inputs[None, :]], mask=(rows < M)[:, None] & inside, other=zero)
            return total + plt.dot(weights, x.T)

        empty = jnp.zeros((tiles.block_n, tiles.block_m), jnp.float32)
        total = lax.fori_loop(part * blocks, jnp.minimum((part + 1) * blocks, whole), block, empty)
        mask = (rows < M)[None, :] & (features < N)[:, None]
        plt.store(out_ref.at[part, rows[None, :], features[:, None]], total, mask=mask)

    return pl.pallas_call(
        kernel,
        grid=(-(-M // tiles.block_m), -(-N // tiles.block_n), splits),
        out_shape=jax.ShapeDtypeStruct((splits, M, N), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="dense_matmul",
    )(index.reshape(1), x, stack)
