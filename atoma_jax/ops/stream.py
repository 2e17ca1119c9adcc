"""Products of the residual stream, and products that are added to it. Their weights may be cut over devices, and the
stream's tokens too: in front of a product they are joined, behind it summed and cut, or both while they go round.

How the stream lies is `residual.py`'s, the ring is `ring.py`'s, and products are `ops.linear`'s. Without a mesh nothing
is joined and nothing summed.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from atoma_jax.model_spec import Activation
from atoma_jax.ops.backend import Backend
from atoma_jax.ops.kernel_linear import has_kernel
from atoma_jax.ops.linear import at_hand, gated_net, in_variant, is_one_call, linear, linear_added
from atoma_jax.ops.parts import inputs_of, quantized_parts
from atoma_jax.ops.pending import Added, Attended, Normed, computed
from atoma_jax.ops.residual import all_tokens, is_cut, own_tokens, sum_of_parts
from atoma_jax.ops.ring import goes_round, joined_products, summed_nets, summed_products
from atoma_jax.ops.rowwise import gated
from atoma_jax.quant.qtensor import LayerVariants, QTensor
from sharding.collectives import size_of


def linear_of_stream(
    x: Float[Array, "t D"] | Normed,
    weight: QTensor | LayerVariants | Array,
    backend: Backend,
    *,
    tokens: int,
    layer: Int32[Array, ""],
    int8_activations: bool = False,
    gate: Activation | None = None,
) -> Float32[Array, "T any"]:
    """`linear` of all `tokens` of a step, of which this device may have a part."""
    if backend.multiplies_alone:
        return linear(x, weight, backend, layer=layer, int8_activations=int8_activations, gate=gate)
    x = computed(x, backend)  # of this device's tokens alone
    y = _of_joined(x, weight, backend, layer, tokens=tokens, int8_activations=int8_activations)
    return y if gate is None else gated(y, gate, backend)


def _of_joined(
    x: Float[Array, "t D"],
    weight: QTensor | LayerVariants | Array,
    backend: Backend,
    layer: Int32[Array, ""],
    *,
    tokens: int,
    int8_activations: bool,
) -> Float32[Array, "T N"]:
    is_whole = x.shape[0] == tokens
    if not is_whole and not int8_activations:
        x = _as_sent(x, weight, backend)
    if is_whole or not goes_round(tokens, x.shape[1], backend.mesh, "tensor"):
        whole = all_tokens(x, tokens, backend.mesh)
        return linear(whole, weight, backend, layer=layer, int8_activations=int8_activations)

    def products(stack: QTensor | Array, place: Int32[Array, ""]) -> Float32[Array, "T N"]:
        stack = at_hand(stack, place, backend)

        def product(part: Float[Array, "t D"]) -> Float32[Array, "t N"]:
            return linear(part, stack, backend, layer=place, int8_activations=int8_activations)

        return joined_products(x, product, backend.mesh)

    return in_variant(weight, layer, products)


def linear_of_parts(
    x: Float[Array, "T K"] | Normed | Attended,
    weight: QTensor | LayerVariants | Array,
    backend: Backend,
    *,
    width: int,
    layer: Int32[Array, ""],
    int8_activations: bool = False,
    whole: bool = False,
    residual: Float32[Array, "t D"] | Added | None = None,
) -> Float32[Array, "t D"] | Added:
    """`linear` where inputs may be cut over devices, as heads and feed-forward nets are: the sum over the parts, of the
    tokens that this device has of the stream, which is `width` wide. `whole`: every device has all inputs. `residual`:
    what it is added to, which may be left to the norm that comes next."""
    if backend.multiplies_alone:
        if residual is None:
            return linear(x, weight, backend, layer=layer, int8_activations=int8_activations)
        return linear_added(x, weight, residual, backend, layer=layer, int8_activations=int8_activations)
    y = _over_parts(
        computed(x, backend), weight, backend, layer, width=width, whole=whole, int8_activations=int8_activations
    )
    return y if residual is None else computed(residual, backend) + y


def _over_parts(
    x: Float[Array, "T K"],
    weight: QTensor | LayerVariants | Array,
    backend: Backend,
    layer: Int32[Array, ""],
    *,
    width: int,
    whole: bool,
    int8_activations: bool,
) -> Float32[Array, "t D"]:
    mesh = backend.mesh
    if whole or size_of(mesh, "tensor") == 1:
        return own_tokens(linear(x, weight, backend, layer=layer, int8_activations=int8_activations), mesh)
    in_ring = is_cut(x.shape[0], mesh) and goes_round(x.shape[0], width, mesh, "tensor")
    factor: Float32[Array, "T 1"] | None = None
    if int8_activations:
        x, factor = quantized_parts(x, mesh)

    def products(stack: QTensor | Array, place: Int32[Array, ""]) -> Float32[Array, "any D"]:
        inputs = inputs_of(x, stack, mesh)
        if not in_ring:
            return linear(inputs, stack, backend, layer=place)
        stack = at_hand(stack, place, backend)
        inputs = inputs.reshape(size_of(mesh, "tensor"), -1, inputs.shape[1])
        return summed_products(inputs, lambda part: linear(part, stack, backend, layer=place), mesh, "tensor")

    y = in_variant(weight, layer, products)
    y = y if in_ring else sum_of_parts(y, mesh)
    return y if factor is None else y * own_tokens(factor, mesh)


def net_of_stream(
    x: Float[Array, "any D"] | Normed,
    up: QTensor | LayerVariants | Array,
    down: QTensor | LayerVariants | Array,
    activation: Activation,
    backend: Backend,
    *,
    tokens: int,
    layer: Int32[Array, ""],
    int8_activations: bool = False,
    sub_norm: Callable[[Array], Array | Normed] | None = None,
    residual: Float32[Array, "t D"] | Added | None = None,
) -> Float32[Array, "t D"]:
    """The gated net down(activation(gate · x) · (up · x)) of a step of so many `tokens`, of which `x` has all or this
    device's: of the tokens that this device has of the stream.

    Args:
        x: activations.
        up: of gates, then of ups.
        down: of what they make.
        activation: of gates.
        backend: where it runs.
        tokens: T.
        layer: whose weights.
        int8_activations: as in `linear`.
        sub_norm: in front of `down`; devices need one another in it.
        residual: what the net is added to.
    """
    mesh, width = backend.mesh, x.shape[1]
    has_norm = sub_norm is not None
    if backend.multiplies_alone and is_one_call(
        up, down, backend, int8_activations=int8_activations, has_norm=has_norm
    ):

        def net(
            ups: QTensor | Array, up_place: Int32[Array, ""], downs: QTensor | Array, down_place: Int32[Array, ""]
        ) -> Float32[Array, "T D"]:
            return gated_net(
                *(x, ups, up_place, downs, down_place, activation, backend),
                int8_activations=int8_activations,
                sub_norm=sub_norm,
                residual=residual,
            )

        return _in_both(up, down, layer, net)
    apart = has_norm or int8_activations or _is_permuted(down)
    if apart or x.shape[0] == tokens or not goes_round(tokens, width, mesh, "tensor"):
        h = linear_of_stream(
            x, up, backend, tokens=tokens, layer=layer, int8_activations=int8_activations, gate=activation
        )
        y = linear_of_parts(
            h if sub_norm is None else sub_norm(h),
            down,
            backend,
            width=width,
            layer=layer,
            int8_activations=int8_activations,
            residual=residual,
        )
        return computed(y, backend)
    sent = _as_sent(computed(x, backend), up, backend)

    def ring(
        ups: QTensor | Array, up_place: Int32[Array, ""], downs: QTensor | Array, down_place: Int32[Array, ""]
    ) -> Float32[Array, "t D"]:
        ups, downs = at_hand(ups, up_place, backend), at_hand(downs, down_place, backend)

        def net_of(part: Float[Array, "t D"]) -> Float32[Array, "t D"]:
            return gated_net(part, ups, up_place, downs, down_place, activation, backend)

        return summed_nets(sent, net_of, mesh)

    y = _in_both(up, down, layer, ring)
    return y if residual is None else computed(residual, backend) + y


def _in_both(
    up: QTensor | LayerVariants | Array,
    down: QTensor | LayerVariants | Array,
    layer: Int32[Array, ""],
    use: Callable[[QTensor | Array, Array, QTensor | Array, Array], Array],
) -> Array:
    """`use` of the stacks that hold a layer's two weights, and of its places in them."""

    def of_up(ups: QTensor | Array, up_place: Int32[Array, ""]) -> Array:
        return in_variant(down, layer, lambda downs, down_place: use(ups, up_place, downs, down_place))

    return in_variant(up, layer, of_up)


def _as_sent(x: Float[Array, "t D"], weight: QTensor | LayerVariants | Array, backend: Backend) -> Float[Array, "t D"]:
    """Activations as products with a weight take them: rounded, they are half the bytes."""
    return x.astype(jnp.bfloat16) if _rounds_inputs(weight, backend) else x


def _rounds_inputs(weight: QTensor | LayerVariants | Array, backend: Backend) -> bool:
    if isinstance(weight, LayerVariants):
        return all(_rounds_inputs(stack, backend) for stack in weight.stacks)
    if isinstance(weight, QTensor):
        return backend.operands == "bfloat16" or has_kernel(weight, backend)
    return weight.dtype == jnp.bfloat16


def _is_permuted(weight: QTensor | LayerVariants | Array) -> bool:
    """Whether a weight takes inputs of all devices."""
    stacks = weight.stacks if isinstance(weight, LayerVariants) else (weight,)
    return any(isinstance(stack, QTensor) and stack.permutation is not None for stack in stacks)
