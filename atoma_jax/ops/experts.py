"""The feed-forward net of a mixture: products of each token with the weights of its experts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from atoma_jax.ops.backend import Backend
from atoma_jax.ops.kernel_linear import format_of, has_kernel, stack_of
from atoma_jax.ops.linear import in_variant, layer_of, linear, picked, tiled_linear
from atoma_jax.ops.parts import inputs_of, own_experts, quantized_parts, stacked, without_last
from atoma_jax.ops.residual import sum_of_parts
from atoma_jax.quant.qtensor import LayerVariants, QTensor
from pallas_kernels import grouped_matmul as grouped_kernels
from pallas_kernels import quantized_matmul as matmul_kernels
from pallas_kernels.activations import Rows, activations, summed
from pallas_kernels.planar_matmul import form_of, planar_grouped_matmul
from pallas_kernels.tuning import matmul_tiles
from sharding.collectives import size_of


def grouped_feed_forward(
    x: Float[Array, "T D"],
    experts: Int32[Array, "T k"],
    weights: Float32[Array, "T k"],
    gate_up: QTensor | LayerVariants | Array,
    down: QTensor | LayerVariants | Array,
    activate: Callable[[Array], Array],
    backend: Backend,
    *,
    layer: Int32[Array, ""],
    int8_activations: bool,
) -> Float32[Array, "t D"]:
    """The weighted sum of each token's experts: down(activate(gate_up · x)), of the tokens that this device has of the
    stream. Only experts that are chosen are read.

    Args:
        x: tokens.
        experts: that each token goes to.
        weights: of each of them.
        gate_up: of all layers and experts, `[L, E, 2F, D]`.
        down: likewise, `[L, E, D, F]`.
        activate: `[rows, 2F]` to `[rows, F]`.
        backend: where it runs.
        layer: which layer's weights.
        int8_activations: as in `linear`.
    """
    E = jax.tree.leaves(gate_up)[0].shape[1]  # every layout has its leading axes first
    mesh = backend.mesh
    if size_of(mesh, "expert") > 1:
        experts, weights = own_experts(experts, weights, E, mesh)
        kinds = E + 1  # the last stands for the experts of other devices
        blocks = without_last(grouped_kernels.expert_blocks(experts, kinds), E)
    else:
        kinds = E
        blocks = grouped_kernels.expert_blocks(experts, kinds)
    in_parts = size_of(mesh, "tensor") > 1

    def grouped(
        x: Float[Array, "padded K"],
        weight: QTensor | LayerVariants | Array,
        *,
        cut_inputs: bool,
        int8_activations: bool,
    ) -> Float32[Array, "padded N"]:
        def product(stack: QTensor | Array, place: Int32[Array, ""]) -> Float32[Array, "padded N"]:
            rows = inputs_of(x, stack, mesh) if cut_inputs else x
            if backend.gathers:
                stack, place = stacked(layer_of(stack, place, backend)), jnp.int32(0)
            if isinstance(stack, QTensor) and has_kernel(stack, backend) and stack.permutation is None:
                return _kernel_grouped(rows, blocks, stack, place, backend, int8_activations=int8_activations)
            N = stack.shape[0] if isinstance(stack, QTensor) else stack.shape[2]

            def of_expert(block: Float[Array, "M K"], expert: Int32[Array, ""]) -> Float32[Array, "M N"]:
                if isinstance(stack, QTensor) and stack.layout == "tiles":
                    index = (place, expert)
                    return tiled_linear(block, stack, index, backend, int8_activations=int8_activations)
                return linear(block, picked(stack, place, expert), backend, int8_activations=int8_activations)

            return grouped_kernels.grouped_product(rows, blocks, of_expert, N)

        return in_variant(weight, layer, product)

    rows = grouped_kernels.sorted_rows(x, blocks, kinds)
    hidden = activate(grouped(rows, gate_up, cut_inputs=False, int8_activations=int8_activations))
    factor: Float32[Array, "padded 1"] | None = None
    if in_parts and int8_activations:
        (hidden, factor), int8_activations = quantized_parts(hidden, mesh), False
    y = grouped(hidden, down, cut_inputs=in_parts, int8_activations=int8_activations)
    y = y if factor is None else y * factor
    return sum_of_parts(grouped_kernels.combine(y, blocks, weights), mesh, "expert")


def _kernel_grouped(
    rows: Float[Array, "padded K"],
    blocks: grouped_kernels.ExpertBlocks,
    weight: QTensor,
    layer: Int32[Array, ""],
    backend: Backend,
    *,
    int8_activations: bool,
) -> Float32[Array, "padded N"]:
    """Products of `sorted_rows` with the weights `[L, E, N, K]` of their experts in one layer, by Pallas."""
    kind, (N, K), E = format_of(weight), weight.shape, weight.lead[1]
    M = rows.shape[0] - blocks.pair.shape[0]
    operation = "planar_grouped_matmul"
    tiles = matmul_tiles(backend.device, operation, M=M, N=N, K=K, bits=kind.bits, group=kind.group)
    factor: Float32[Array, "padded 1"] | None = None
    if int8_activations:
        codes, factor = matmul_kernels.quantize_tokens(rows)
        rows = codes.astype(jnp.bfloat16)
    interpret = backend.kernels == "interpret"
    parts = planar_grouped_matmul(
        activations(Rows(rows), form_of(kind, tiles), interpret=interpret).inputs,
        stack_of(weight),
        blocks.used,
        layer * E + blocks.expert,
        blocks.start,
        blocks.stop,
        kind,
        tiles,
        most=M,
        interpret=interpret,
    )
    y = summed(parts)
    return y if factor is None else y * factor
