"""A weight in the planar layout, written as bfloat16: what many rows multiply, as a Pallas kernel for NVIDIA GPUs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, BFloat16, Int32

from pallas_kernels.planar_weights import PlanarFormat, PlanarStack, factors_of, load, named, present, stored_factors
from pallas_kernels.unpacking import unpack

_ROWS = 32  # out-features of a program
_BLOCKS = 2  # of words that it reads, where their number is even


def planar_dequantized(
    stack: PlanarStack, index: Int32[Array, ""], kind: PlanarFormat, K: int, *, interpret: bool = False
) -> BFloat16[Array, "N K"]:
    """W = stack[index] in bfloat16, in memory: where so many rows multiply it that a dense product is faster.

    Args:
        stack: weights.
        index: which.
        kind: their format; must be aligned.
        K: inputs.
        interpret: run the kernel's steps as plain JAX, on any device.
    """
    assert kind.is_aligned, kind
    N, P = stack.words.shape[1], kind.plane
    turn = _BLOCKS if K // kind.block % _BLOCKS == 0 else 1

    def kernel(*refs: Any) -> None:
        index_ref, out_ref, [stack_refs] = refs[0], refs[-1], named(refs[1:-1], stack)
        first = pl.program_id(1) * turn
        feature = pl.program_id(0) * _ROWS + lax.iota(jnp.int32, _ROWS)
        is_feature, column = feature < N, lax.iota(jnp.int32, P)

        def words(b: Any) -> Array:
            place = index_ref[0], feature[:, None], (b * P + column)[None, :]
            return load(stack_refs.words, place, is_feature[:, None])

        # All reads of a program are under way before it writes.
        read = [(first + i, words(first + i)) for i in range(turn)]
        inputs = [b * kind.block + i * P for b, _ in read for i in range(16 // kind.bits)]
        groups = [lax.div(at, kind.group) for at in inputs]
        stored = [stored_factors(stack_refs, (index_ref[0], group, feature), is_feature) for group in groups]
        what: Any = {"bits": kind.bits, "zero": kind.zero, "table": kind.table, "assembly": not interpret}
        numbers = [number for _, packed in read for number in unpack(packed, **what)]
        for at, factors, number in zip(inputs, stored, numbers, strict=True):
            scale, low = factors_of(factors, stack_refs)
            weight = number.astype(jnp.float32) * scale[:, None]
            weight = weight if low is None else weight - low[:, None]
            to = feature[:, None], (at + column)[None, :]
            plt.store(out_ref.at[to], weight.astype(jnp.bfloat16), mask=is_feature[:, None])

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(N, _ROWS), K // kind.block // turn),
        out_shape=jax.ShapeDtypeStruct((N, K), jnp.bfloat16),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=f"planar_dequantized_{kind.bits}",
    )(index.reshape(1), *present(stack))
