"""Products by Pallas kernels. With few rows a step waits for launches, so that what stands in front of a product (a
norm, a gate, what was added to the residual stream) is made in the one launch that rounds its activations, and a
product's parts are added up by whoever reads them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from atoma_jax.model_spec import Activation
from atoma_jax.ops.backend import Backend
from atoma_jax.ops.pending import Added, Attended, Normed, computed
from atoma_jax.ops.rowwise import activated, gated
from atoma_jax.quant.qtensor import QTensor
from pallas_kernels import quantized_matmul as matmul_kernels
from pallas_kernels.activations import (
    IN_ORDER,
    Form,
    GatedRows,
    InFields,
    Made,
    NormedRows,
    Rows,
    Source,
    activations,
    summed,
)
from pallas_kernels.decode_combine import can_write, combined_activations
from pallas_kernels.dense_matmul import dense_matmul
from pallas_kernels.planar_dequantize import planar_dequantized
from pallas_kernels.planar_matmul import form_of, planar_matmul
from pallas_kernels.planar_weights import PlanarFormat, PlanarStack
from pallas_kernels.ternary_matmul import is_ternary, ternary_matmul
from pallas_kernels.tuning import matmul_tiles

# Rows beyond which a weight is dequantized into memory for its one product: with so many that and the dense product
# take less time than unpacking it anew for each tile of rows (docs/kernels.md has the numbers). Launches count for
# little then, and norms are XLA's.
PACKED_ROWS = 128


class _Product(NamedTuple):
    """A weight's kernel, for some number of rows."""

    form: Form  # that it takes
    parts: Callable[[Any], Float32[Array, "splits M N"]]  # of the product of such activations


def kernel_parts(
    x: Float[Array, "T K"] | Normed | Attended,
    weight: QTensor | Array,
    layer: Int32[Array, ""] | None,
    backend: Backend,
    *,
    int8_activations: bool,
) -> Float32[Array, "splits T N"]:
    """`linear` of a weight, or of one of a stack, that Pallas reads in place: parts to be added up."""
    if isinstance(weight, QTensor) and weight.permutation is not None:
        place = jnp.int32(0) if layer is None or weight.lead == () else layer
        x = computed(x, backend)[:, weight.permutation.reshape(-1, weight.shape[1])[place]]
    factor: Float32[Array, "T 1"] | None = None
    if int8_activations and not (isinstance(weight, QTensor) and takes_tokens(weight)):
        codes, factor = matmul_kernels.quantize_tokens(computed(x, backend))
        x, int8_activations = codes.astype(jnp.bfloat16), False  # exact
    product = _product(weight, layer, x.shape[0], backend, int8_activations=int8_activations)
    if isinstance(x, Attended) and can_write(x.decoded, product.form):
        inputs = combined_activations(x.decoded, product.form, interpret=backend.kernels == "interpret")
    else:
        inputs = _made(_source(x, backend), product.form, backend).inputs
    parts = product.parts(inputs)
    return parts if factor is None else parts * factor


def kernel_net(
    x: Float[Array, "T K"] | Normed,
    up: QTensor | Array,
    up_layer: Int32[Array, ""],
    down: QTensor | Array,
    down_layer: Int32[Array, ""],
    activation: Activation,
    backend: Backend,
    *,
    int8_activations: bool,
    sub_norm: Callable[[Array], Array | Normed] | None,
    residual: Float32[Array, "T N"] | Added | None,
) -> Float32[Array, "T N"]:
    """`gated_net` of weights that Pallas reads in place: none is permuted, and each `takes_tokens` if activations are
    int8."""
    ups = _product(up, up_layer, x.shape[0], backend, int8_activations=int8_activations)
    downs = _product(down, down_layer, x.shape[0], backend, int8_activations=int8_activations)
    made = _made(_source(x, backend), ups.form, backend)
    gates = ups.parts(made.inputs)
    source: Source = GatedRows(gates, partial(activated, activation=activation))
    if sub_norm is not None:
        source = _source(sub_norm(gated(summed(gates), activation, backend)), backend)
    parts = downs.parts(_made(source, downs.form, backend).inputs)
    if residual is None:
        return summed(parts)
    if made.total is not None and isinstance(x, Normed) and residual is x.x:
        residual = made.total  # which the norm has added up
    return computed(Added(computed(residual, backend), parts), backend)


def has_kernel(weight: QTensor | Array, backend: Backend) -> bool:
    """Whether Pallas multiplies a weight: a packed one, or one of a stack of bfloat16 matrices."""
    if not backend.uses_pallas:
        return False
    if not isinstance(weight, QTensor):
        return weight.ndim == 3 and weight.dtype == jnp.bfloat16
    if weight.layout != "planar" or not format_of(weight).is_aligned:
        return False
    # Triton counts in 32 bits up to 4 GiB: in an array of bytes, what lies behind 2 GiB would wrap around. The words
    # of ternary weights may be read as bytes.
    in_bytes = [leaf.size for leaf in (weight.scales, weight.mins) if leaf is not None and leaf.dtype == jnp.int8]
    in_bytes += [2 * weight.codes.size] if weight.bits == 2 else []
    return not any(2**31 <= size <= 2**32 for size in in_bytes)


def format_of(weight: QTensor) -> PlanarFormat:
    """What the kernels of the planar layout call it."""
    return PlanarFormat(weight.bits, weight.plane, weight.group, weight.zero, weight.table)


def stack_of(weight: QTensor) -> PlanarStack:
    """A weight with its leading axes as one."""
    parts = (weight.codes, weight.scales, weight.mins, weight.scale_supers, weight.min_supers)
    return PlanarStack(*(None if part is None else part.reshape(-1, *part.shape[-2:]) for part in parts))


def takes_tokens(weight: QTensor) -> bool:
    """Whether its products with int8 activations are sums of integers alone."""
    return weight.layout == "planar" and weight.mins is None and is_ternary(format_of(weight), weight.shape[1])


def _product(
    weight: QTensor | Array, layer: Int32[Array, ""] | None, M: int, backend: Backend, *, int8_activations: bool
) -> _Product:
    interpret = backend.kernels == "interpret"
    if not isinstance(weight, QTensor):
        assert layer is not None, "the weight is of several layers"
        tiles = matmul_tiles(
            backend.device, "dense_matmul", M=M, N=weight.shape[1], K=weight.shape[2], bits=16, group=1
        )
        return _Product(IN_ORDER, lambda x: dense_matmul(x, weight, layer, tiles, interpret=interpret))
    kind, stack, (N, K) = format_of(weight), stack_of(weight), weight.shape
    place = jnp.int32(0) if layer is None or weight.lead == () else layer
    shape = {"M": M, "N": N, "K": K, "bits": kind.bits, "group": kind.group}
    if int8_activations:
        tiles = matmul_tiles(backend.device, "ternary_matmul", **shape)

        def of_tokens(x: Any) -> Float32[Array, "1 M N"]:
            return ternary_matmul(x, stack.words, stack.scales, place, kind, tiles, interpret=interpret)[None]

        return _Product(InFields(kind.plane), of_tokens)
    if M > PACKED_ROWS:

        def of_dequantized(x: Any) -> Float32[Array, "1 M N"]:
            return matmul_kernels.dot(x, planar_dequantized(stack, place, kind, K, interpret=interpret))[None]

        return _Product(IN_ORDER, of_dequantized)
    tiles = matmul_tiles(backend.device, "planar_matmul", **shape)
    return _Product(form_of(kind, tiles), lambda x: planar_matmul(x, stack, place, kind, tiles, interpret=interpret))


def _source(x: Float[Array, "T K"] | Normed | Attended, backend: Backend) -> Source:
    if not isinstance(x, Normed) or x.shape[0] > PACKED_ROWS:
        return Rows(computed(x, backend))
    rows, parts = (x.x.residual, x.x.parts) if isinstance(x.x, Added) else (computed(x.x, backend), None)
    return NormedRows(rows, parts, x.scales, x.layer, x.eps)


def _made(source: Source, form: Form, backend: Backend) -> Made:
    return activations(source, form, interpret=backend.kernels == "interpret")
