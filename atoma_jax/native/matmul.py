"""Typed calls of the kernels for weights in tiles (`src/matmul.h`): products, gated nets, and look-ups of rows.

A call gets the arrays of a whole stack and the index of one matrix in it: a slice would be copied before every call.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from atoma_jax.model_spec import Activation
from atoma_jax.native.rowwise import GATES
from atoma_jax.quant.qtensor import TILE, QTensor

# How activations are rounded: to int8 in groups of 32; what that leaves likewise, as a second plane; to int8 by token;
# not at all.
Activations = Literal["groups", "planes", "tokens", "exact"]
_ACTIVATIONS: Final[dict[Activations, int]] = {"groups": 0, "planes": 1, "tokens": 2, "exact": 3}

_TABLE = 16  # numbers
_CODES: Final[Mapping[int, int]] = MappingProxyType({8: 0, 4: 1, 2: 3, 6: 4, 5: 5, 3: 6})  # of `enum class Codes`
_TABLE_CODES = 2


def matmul(
    x: Float32[Array, "T K"],
    weight: QTensor,
    index: Int32[Array, ""],
    activations: Activations,
    *,
    norm: tuple[Float32[Array, " K"], float] | None = None,
    gate: Activation | None = None,
    residual: Float32[Array, "T N"] | None = None,
) -> Float32[Array, "T width"]:
    """x · Wᵀ, summed in float32. A row depends on that row of `x` alone, bit for bit.

    Args:
        x: activations. A row with NaN or infinity gives NaN, and no other does.
        weight: a stack in tiles, its columns not permuted.
        index: of the matrix in it, leading axes flattened.
        activations: how they are rounded.
        norm: scale and epsilon of `rowwise.rms_norm` of `x`, in front of the product and with its bits.
        gate: the same of `rowwise.gated` behind it: of N columns come N / 2. Where `takes_gate` says so.
        residual: what the product is added to, unless there is a gate.
    """
    T, N = x.shape[0], weight.shape[0]
    out = jax.ShapeDtypeStruct((T, N if gate is None else N // 2), jnp.float32)
    scale, eps = (jnp.zeros(0, jnp.float32), 0.0) if norm is None else norm
    operands = (x, *_arrays(weight), index, scale)
    in_place = residual is not None and gate is None  # what nothing else reads is not copied
    alias = {len(operands): 0} if in_place else {}
    added = jnp.zeros((0, 0), jnp.float32) if residual is None else residual
    return jax.ffi.ffi_call("atoma_matmul", out, input_output_aliases=alias)(
        *(*operands, added),
        **_attributes(weight),
        activations=np.int64(_ACTIVATIONS[activations]),
        eps=np.float32(eps),
        gate=np.int64(-1 if gate is None else GATES[gate]),
    )


def gated_net(
    x: Float32[Array, "T K"],
    up: QTensor,
    up_index: Int32[Array, ""],
    down: QTensor,
    down_index: Int32[Array, ""],
    activations: Activations,
    gate: Activation,
    *,
    norm: tuple[Float32[Array, " K"], float] | None = None,
    residual: Float32[Array, "T N"] | None = None,
) -> Float32[Array, "T N"]:
    """Two calls of `matmul`, one behind the other, as one and with their bits; where `takes_net` says so.

    Args:
        x: activations.
        up: of gates, then of ups.
        up_index: of the matrix in its stack, leading axes flattened.
        down: of what the gate makes of both.
        down_index: likewise.
        activations: how those of both products are rounded.
        gate: what becomes of gates.
        norm: in front of `up`, as in `matmul`.
        residual: what the net is added to; `x` itself needs no memory of its own.
    """
    out = jax.ShapeDtypeStruct((x.shape[0], down.shape[0]), jnp.float32)
    scale, eps = (jnp.zeros(0, jnp.float32), 0.0) if norm is None else norm
    operands = (x, *_arrays(up), up_index, *_arrays(down), down_index, scale)
    adds_input = residual is x
    alias = {0: 0} if adds_input else {} if residual is None else {len(operands): 0}  # in place, as in `matmul`
    added = jnp.zeros((0, 0), jnp.float32) if residual is None or adds_input else residual
    return jax.ffi.ffi_call("atoma_net", out, input_output_aliases=alias)(
        *(*operands, added),
        **{f"up_{name}": value for name, value in _attributes(up).items()},
        **{f"down_{name}": value for name, value in _attributes(down).items()},
        activations=np.int64(_ACTIVATIONS[activations]),
        eps=np.float32(eps),
        gate=np.int64(GATES[gate]),
        adds_input=adds_input,
    )


def takes_net(up: QTensor, activations: Activations) -> bool:
    """Whether what a gate makes can be rounded tile by tile."""
    return takes_gate(up) and activations in {"groups", "planes"}


def takes_gate(weight: QTensor) -> bool:
    """Whether gates and ups are whole tiles."""
    return weight.shape[0] % (2 * TILE) == 0


def rows(ids: Int32[Array, " T"], weight: QTensor, index: Int32[Array, ""]) -> Float32[Array, "T K"]:
    """Rows of a weight in float32, exact; NaN where an id is outside."""
    out = jax.ShapeDtypeStruct((ids.shape[0], weight.shape[1]), jnp.float32)
    return jax.ffi.ffi_call("atoma_rows", out)(ids, *_arrays(weight), index, **_attributes(weight))


def _arrays(weight: QTensor) -> tuple[Array, ...]:
    """Of a weight, with empty ones for what it does not have."""
    assert weight.layout == "tiles", weight.layout
    none = jnp.zeros((0,), jnp.float32)
    children = (weight.mins, weight.scale_supers, weight.min_supers)
    return weight.codes, weight.scales, *(none if child is None else child for child in children)


def _attributes(weight: QTensor) -> dict[str, np.int64 | np.ndarray]:
    table = np.zeros(0 if weight.table is None else _TABLE, np.int32)
    if weight.table is not None:
        table[: len(weight.table)] = weight.table
    return {
        "columns": np.int64(weight.shape[0]),
        "codes": np.int64(_CODES[weight.bits] if weight.table is None else _TABLE_CODES),
        "zero": np.int64(weight.zero),
        "table": table,
    }
