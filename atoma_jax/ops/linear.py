"""Products with a weight, by the kernels of its layout: native, Pallas, or XLA's own."""

from collections.abc import Callable
from functools import partial
from typing import TypeGuard

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from atoma_jax.model_spec import Activation
from atoma_jax.native import dense as native_dense
from atoma_jax.native import matmul as native_matmul
from atoma_jax.ops.backend import Backend, Precision
from atoma_jax.ops.kernel_linear import format_of, has_kernel, kernel_net, kernel_parts, takes_tokens
from atoma_jax.ops.parts import gathered
from atoma_jax.ops.pending import Added, Attended, Normed, computed
from atoma_jax.ops.rowwise import gated
from atoma_jax.quant.qtensor import LayerVariants, QTensor
from pallas_kernels import quantized_matmul as matmul_kernels
from pallas_kernels.activations import summed
from pallas_kernels.ternary_matmul import ternary_matmul_xla

# Integer products go group by group: with smaller groups, rounding the activations and multiplying floats is quicker.
_INTEGER_GROUP = 128


def linear(
    x: Float[Array, "T K"] | Normed | Attended,
    weight: QTensor | LayerVariants | Array,
    backend: Backend,
    *,
    layer: Int32[Array, ""] | None = None,
    int8_activations: bool = False,
    gate: Activation | None = None,
) -> Float32[Array, "T any"]:
    """x · Wᵀ for a weight `[N, K]`, summed in float32. Dense weights are multiplied in the type they have.

    Args:
        x: activations.
        weight: of one layer, or of all layers: a stack, or variants.
        backend: where it runs.
        layer: whose of all layers'; without effect for the weight of one.
        int8_activations: each token of `x` is rounded to int8 first, because the model was trained so.
        gate: what becomes of the first half of the product, which is then multiplied by the second: `[T, N / 2]`.
    """
    if isinstance(weight, LayerVariants):
        assert layer is not None, "variants are of several layers"

        def product(stack: QTensor | Array, place: Int32[Array, ""]) -> Float32[Array, "T any"]:
            return linear(x, stack, backend, layer=place, int8_activations=int8_activations, gate=gate)

        return in_variant(weight, layer, product)
    if _is_tiled(weight):
        index = () if layer is None or weight.lead == () else (layer,)
        return tiled_linear(x, weight, index, backend, int8_activations=int8_activations, gate=gate)
    y = _linear(x, weight, backend, layer, int8_activations=int8_activations)
    return y if gate is None else gated(y, gate, backend)


def linear_added(
    x: Float[Array, "T K"] | Normed | Attended,
    weight: QTensor | LayerVariants | Array,
    residual: Float32[Array, "T N"] | Added,
    backend: Backend,
    *,
    layer: Int32[Array, ""],
    int8_activations: bool = False,
) -> Float32[Array, "T N"] | Added:
    """`linear` and what it is added to, where devices multiply alone. The sum may be left to the next norm."""
    if isinstance(weight, LayerVariants):

        def product(stack: QTensor | Array, place: Int32[Array, ""]) -> Float32[Array, "T N"]:
            y = linear_added(x, stack, residual, backend, layer=place, int8_activations=int8_activations)
            return computed(y, backend)  # as the parts of variants differ in number

        return in_variant(weight, layer, product)
    rows = computed(residual, backend)
    if _is_tiled(weight):
        index = () if weight.lead == () else (layer,)
        return tiled_linear(x, weight, index, backend, int8_activations=int8_activations, residual=rows)
    if has_kernel(weight, backend):
        return Added(rows, kernel_parts(x, weight, layer, backend, int8_activations=int8_activations))
    return rows + linear(x, weight, backend, layer=layer, int8_activations=int8_activations)


def _linear(
    x: Float[Array, "T K"] | Normed | Attended,
    weight: QTensor | Array,
    backend: Backend,
    layer: Int32[Array, ""] | None,
    *,
    int8_activations: bool,
) -> Float32[Array, "T N"]:
    """`linear` of a layout whose kernels take no gate in."""
    if layer is not None:
        weight = at_hand(weight, layer, backend)
    if has_kernel(weight, backend):
        return summed(kernel_parts(x, weight, layer, backend, int8_activations=int8_activations))
    x = computed(x, backend)
    if isinstance(weight, Array) and backend.kernels == "native":
        return _native_linear(x, weight, layer, backend, int8_activations=int8_activations)
    if _lead(weight) != ():
        assert layer is not None, "the weight is of several layers"
        weight = picked(weight, layer)
    if int8_activations:
        return _integer_linear(x, weight, backend)
    if isinstance(weight, QTensor):
        return _quantized_linear(x, weight, backend)
    return matmul_kernels.dot(x.astype(weight.dtype), weight)


def at_hand(weight: QTensor | Array, layer: Int32[Array, ""], backend: Backend) -> QTensor | Array:
    """A weight as products take it: where devices spread a stack, one layer of it, gathered."""
    return layer_of(weight, layer, backend) if backend.gathers and _lead(weight) != () else weight


def layer_of(weight: QTensor | Array, layer: Int32[Array, ""], backend: Backend) -> QTensor | Array:
    """One layer of a stack, gathered from the devices that it is spread over."""
    return gathered(picked(weight, layer), backend.mesh)


def _lead(weight: QTensor | Array) -> tuple[int, ...]:
    return weight.lead if isinstance(weight, QTensor) else weight.shape[:-2]


def tiled_linear(
    x: Float[Array, "T K"] | Normed | Attended,
    weight: QTensor,
    index: tuple[Int32[Array, ""], ...],
    backend: Backend,
    *,
    int8_activations: bool,
    gate: Activation | None = None,
    residual: Float32[Array, "T N"] | None = None,
) -> Float32[Array, "T any"]:
    """By the native kernels, which take whole stacks (a part of one would be copied first), and norms, gates and
    residuals in."""
    if weight.permutation is not None:
        x = computed(x, backend)[:, picked(weight.permutation, *index)]
    activations: native_matmul.Activations = "tokens" if int8_activations else _ACTIVATIONS[backend.precision]
    rows, norm = _norm_apart(x, backend)
    product = partial(native_matmul.matmul, rows, weight, _place(weight, index), activations, norm=norm)
    if gate is None:
        return product(residual=residual)
    y = product(gate=gate) if native_matmul.takes_gate(weight) else gated(product(), gate, backend)
    return y if residual is None else residual + y


def gated_net(
    x: Float[Array, "T K"] | Normed,
    up: QTensor | Array,
    up_layer: Int32[Array, ""],
    down: QTensor | Array,
    down_layer: Int32[Array, ""],
    activation: Activation,
    backend: Backend,
    *,
    int8_activations: bool = False,
    sub_norm: Callable[[Array], Array | Normed] | None = None,
    residual: Float32[Array, "T N"] | Added | None = None,
) -> Float32[Array, "T N"]:
    """down(activation(gate · x) · (up · x)), of one device, and what that is added to.

    Args:
        x: activations.
        up: of gates, then of ups; of one layer, or a stack.
        up_layer: whose of a stack; without effect for the weight of one.
        down: of what they make.
        down_layer: likewise.
        activation: of gates.
        backend: where it runs.
        int8_activations: as in `linear`.
        sub_norm: in front of `down`.
        residual: what the net is added to.
    """
    int8 = int8_activations
    if not is_one_call(up, down, backend, int8_activations=int8, has_norm=sub_norm is not None):
        h = linear(x, up, backend, layer=up_layer, int8_activations=int8, gate=activation)
        h = h if sub_norm is None else sub_norm(h)
        if residual is None:
            return linear(h, down, backend, layer=down_layer, int8_activations=int8)
        y = linear_added(h, down, residual, backend, layer=down_layer, int8_activations=int8)
        return computed(y, backend)
    if backend.uses_pallas:
        return kernel_net(
            *(x, up, up_layer, down, down_layer, activation, backend),
            int8_activations=int8,
            sub_norm=sub_norm,
            residual=residual,
        )
    assert isinstance(up, QTensor)
    assert isinstance(down, QTensor)
    residual = None if residual is None else computed(residual, backend)
    rows, norm = _norm_apart(x, backend)
    up_place, down_place = _place(up, (up_layer,) * len(up.lead)), _place(down, (down_layer,) * len(down.lead))
    how = _ACTIVATIONS[backend.precision]
    return native_matmul.gated_net(rows, up, up_place, down, down_place, how, activation, norm=norm, residual=residual)


def is_one_call(
    up: QTensor | LayerVariants | Array,
    down: QTensor | LayerVariants | Array,
    backend: Backend,
    *,
    int8_activations: bool,
    has_norm: bool,
) -> bool:
    """Whether kernels make a gated net as one, whichever of its layers' variants the weights have: a native one all of
    it, or Pallas's so that the next product's activations are made from what one makes. `has_norm`: in front of `down`.
    """
    ups, downs = (weight.stacks if isinstance(weight, LayerVariants) else (weight,) for weight in (up, down))
    if backend.uses_pallas:
        return all(_is_read_in_place(one, backend, int8_activations) for one in (*ups, *downs))
    how = _ACTIVATIONS[backend.precision]
    if int8_activations or has_norm or not all(_is_tiled(stack) and stack.permutation is None for stack in downs):
        return False
    return all(_is_tiled(one) and one.permutation is None and native_matmul.takes_net(one, how) for one in ups)


def _is_read_in_place(weight: QTensor | Array, backend: Backend, int8_activations: bool) -> bool:
    """Whether a Pallas kernel takes a weight as it lies, and activations as another kernel makes them."""
    if not has_kernel(weight, backend) or (backend.gathers and _lead(weight) != ()):
        return False
    if not isinstance(weight, QTensor):
        return not int8_activations
    return weight.permutation is None and (not int8_activations or takes_tokens(weight))


def _is_tiled(weight: QTensor | Array) -> TypeGuard[QTensor]:
    return isinstance(weight, QTensor) and weight.layout == "tiles"


def _place(weight: QTensor, index: tuple[Int32[Array, ""], ...]) -> Int32[Array, ""]:
    """Of a matrix in a stack, leading axes flattened."""
    place = jnp.int32(0)
    for size, at in zip(weight.lead, index, strict=True):
        place = place * size + at
    return place


def _norm_apart(
    x: Float[Array, "T K"] | Normed | Attended, backend: Backend
) -> tuple[Float32[Array, "T K"], tuple[Float32[Array, " K"], float] | None]:
    """Rows, and the norm in front of them, as native kernels take them."""
    if isinstance(x, Normed):
        return computed(x.x, backend).astype(jnp.float32), (x.scale.astype(jnp.float32), x.eps)
    return computed(x, backend).astype(jnp.float32), None


_ACTIVATIONS: dict[Precision, native_matmul.Activations] = {"default": "groups", "high": "planes", "exact": "exact"}


def _native_linear(
    x: Float[Array, "T K"],
    stack: Array,
    layer: Int32[Array, ""] | None,
    backend: Backend,
    *,
    int8_activations: bool,
) -> Float32[Array, "T N"]:
    """`linear` of a dense matrix, or of one of a stack, by the native kernel, which reads it in place. Activations of
    default precision are rounded to bfloat16 where the CPU multiplies a bfloat16 weight so."""
    place = jnp.int32(0) if layer is None or stack.ndim == 2 else layer
    factor: Float32[Array, "T 1"] | None = None
    if int8_activations:
        x, factor = matmul_kernels.quantize_tokens(x)
    y = native_dense.matmul(x.astype(jnp.float32), stack, place, may_round=backend.precision == "default")
    return y if factor is None else y * factor


def _integer_linear(x: Float[Array, "T K"], weight: QTensor | Array, backend: Backend) -> Float32[Array, "T N"]:
    """`linear` of tokens as int8. Their codes are exact in bfloat16 too, so that the factor of a token comes last."""
    if isinstance(weight, QTensor) and weight.permutation is None and takes_tokens(weight):
        return ternary_matmul_xla(x, weight.codes, weight.scales, format_of(weight))
    exact = isinstance(weight, QTensor) and weight.layout == "rows" and weight.codes.dtype == jnp.int8
    if isinstance(weight, QTensor) and exact and weight.group >= _INTEGER_GROUP and weight.permutation is None:
        return matmul_kernels.matmul_int8(x, weight.codes, weight.scales, weight.mins)
    codes, factor = matmul_kernels.quantize_tokens(x)
    return linear(codes.astype(jnp.float32), weight, backend) * factor


def in_variant(
    weight: QTensor | LayerVariants | Array, layer: Int32[Array, ""], use: Callable[[QTensor | Array, Array], Array]
) -> Array:
    """`use(stack, place)` of the stack that holds a layer; it is compiled once for each stack of variants."""
    if not isinstance(weight, LayerVariants):
        return use(weight, layer)
    which, place = jnp.asarray(weight.which)[layer], jnp.asarray(weight.place)[layer]
    return lax.switch(which, [partial(use, stack) for stack in weight.stacks], place)


def picked(weight: QTensor | Array, *index: Int32[Array, ""]) -> QTensor | Array:
    """The part of a weight at an index of its leading axes."""

    def pick(leaf: Array) -> Array:
        rest = leaf.shape[len(index) :]
        start = (*index, *(jnp.int32(0) for _ in rest))
        return lax.dynamic_slice(leaf, start, (*(1 for _ in index), *rest)).reshape(rest)

    return jax.tree.map(pick, weight)


def _quantized_linear(x: Float[Array, "T K"], weight: QTensor, backend: Backend) -> Float32[Array, "T N"]:
    if weight.permutation is not None:
        x = x[:, weight.permutation]
    operands = jnp.dtype(backend.operands)
    if weight.layout == "rows":
        return matmul_kernels.matmul_rows(x, weight.codes, weight.scales, weight.mins, operands=operands)
    return matmul_kernels.matmul_planar(
        x,
        weight.codes,
        matmul_kernels.flat_factors(weight.scales, weight.scale_supers),
        None if weight.mins is None else matmul_kernels.flat_factors(weight.mins, weight.min_supers),
        bits=weight.bits,
        plane=weight.plane,
        zero=weight.zero,
        table=weight.table,
        operands=operands,
    )
