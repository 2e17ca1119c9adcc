"""How a model declares its weights before it has any: shape, logical axes, and how they are filled afterwards."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from atoma_jax.quant.qtensor import LayerVariants, QTensor


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One weight of a model. Its axes are names that `sharding` maps to the axes of a mesh.

    Attributes:
        shape: logical shape; `[N, K]`, out-features first, for matrices, and `[E, N, K]` for those of experts.
        axes: one logical name for each dimension.
        quantizable: the weight may be a `QTensor`.
        stacked: an axis of layers comes before `shape`.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    quantizable: bool = False
    stacked: bool = False


class MatrixParam(nnx.Param[Any]):
    """A matrix that may be quantized. Where these are spread over devices, each is gathered before its layer runs."""


class ExpertParam(nnx.Param[Any]):
    """A weight of experts. A layer gets those of all layers and reads what a step needs: a scan over layers would copy
    every expert of a layer first."""


class NormParam(nnx.Param[Any]):
    """The scale of a norm in front of a product. A layer gets those of all layers, as the kernel that makes a product's
    activations looks it up: a scan would copy it out first."""


# `Any`, as what a parameter holds changes from its spec to an array when it is filled.
def matrix(N: int, K: int, axes: tuple[str, str], *, stacked: bool = True) -> Any:
    """A weight that may be quantized; a layer's, unless it is not stacked."""
    return MatrixParam(ParamSpec((N, K), axes, quantizable=True, stacked=stacked))


def expert_matrix(E: int, N: int, K: int, axes: tuple[str, str, str]) -> Any:
    """One matrix for each expert of each layer; may be quantized."""
    return ExpertParam(ParamSpec((E, N, K), axes, quantizable=True, stacked=True))


def dense_matrix(N: int, K: int, axes: tuple[str, str]) -> Any:
    """A layer's matrix that stays in float32."""
    return nnx.Param(ParamSpec((N, K), axes, stacked=True))


def vector(n: int, axis: str, *, stacked: bool = True) -> Any:
    """A dense float32 vector, such as a norm's scale or a bias; a layer's, unless it is not stacked."""
    return nnx.Param(ParamSpec((n,), (axis,), stacked=stacked))


def norm(n: int, axis: str) -> Any:
    """The scale of a layer's norm in front of a product, in float32."""
    return NormParam(ParamSpec((n,), (axis,), stacked=True))


def specs_of(model: nnx.Module) -> dict[str, ParamSpec]:
    """Every weight that `model` declares, by dotted path."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}


def indexed(_path: Any, parameter: Any) -> bool:
    """A filter for `nnx.split`: parameters that a layer gets whole, of all layers, and looks its own part up in.

    Packed weights and bfloat16 matrices are among them, as kernels read them where they lie: a scan would copy a
    layer's out first.
    """
    value = parameter.get_value()
    if isinstance(parameter, (ExpertParam, NormParam)) or isinstance(value, LayerVariants):
        return True
    if isinstance(value, QTensor):
        return value.layout != "rows"
    return len(value.shape) == 3 and value.dtype == jnp.bfloat16


def gathered_ahead(_path: Any, parameter: Any) -> bool:
    """A filter for `nnx.split`: matrices that can be gathered a layer ahead. Layers of several forms are not: what is
    ahead would be now of one shape, now of another. Experts are gathered when they are used."""
    return isinstance(parameter, MatrixParam) and not isinstance(parameter.get_value(), LayerVariants)


def fill(model: nnx.Module, values: Mapping[str, Any]) -> None:
    """Puts arrays, `QTensor`s and `LayerVariants` in the places that `specs_of` lists."""
    for path, leaf in nnx.iter_graph(model):
        if isinstance(leaf, nnx.Param):
            name = ".".join(map(str, path))
            value, spec = values[name], leaf.get_value()
            for stack in value.stacks if isinstance(value, LayerVariants) else (value,):
                shape = (*stack.lead, *stack.shape) if isinstance(stack, QTensor) else stack.shape
                assert tuple(shape[1 if spec.stacked else 0 :]) == spec.shape, (name, shape, spec.shape)
            leaf.set_value(value)
