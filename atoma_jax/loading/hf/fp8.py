"""Weights in float8_e4m3fn with scales, `quant_method` "fp8": blocks as DeepSeek and Qwen publish them, rows, or whole.

`weight_scale_inv` and `weight_scale` both multiply. Activations stay in the engine's own type, wider than the float8
that these models may run with, so that what a file says of activations is not needed.
"""

from dataclasses import dataclass

import numpy as np

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.hf.safetensors import RawTensor
from atoma_jax.loading.hf.tensors import (
    FLOAT_DTYPES,
    FLOATS,
    ActivationScheme,
    Blocks,
    Module,
    QuantizedTensor,
    ReadRows,
    check_matrix,
    check_shape,
    row_scales,
)
from atoma_jax.loading.json_file import Section
from atoma_jax.quant.groups import GroupFormat

_ACTIVATIONS = ("input_scale", "activation_scale")


@dataclass(frozen=True, slots=True)
class FP8:
    """A `Scheme`."""

    block: tuple[int, int] | None  # rows, columns; None for scales of rows or of the whole weight
    activation_scheme: ActivationScheme = None

    @classmethod
    def of(cls, config: Section) -> "FP8":
        """From a `quantization_config`.

        Raises:
            UnsupportedModelError: a kind of scales or float that is not implemented.
            WeightFileError: a value has the wrong type.
        """
        config.choice("fmt", "e4m3", ("e4m3", "float8_e4m3fn"))
        config.choice("scale_fmt", "float", ("float",))
        config.choice("expert_dtype", "fp8", ("fp8",))
        return cls(block_shape(config, "weight_block_size"))

    def assemble(self, module: Module) -> QuantizedTensor | None:
        """Takes weight and weight_scale_inv or weight_scale, of a module whose weight is float8."""
        weight = module.parts.get("weight")
        if weight is None or weight.dtype != "F8_E4M3":
            return None
        module.take("weight", ("F8_E4M3",))
        name = "weight_scale_inv" if "weight_scale_inv" in module else "weight_scale"
        scale = module.take(name, FLOATS)
        module.drop(*_ACTIVATIONS)
        return float8_tensor(f"{module.name}.weight", weight, scale, self.block if name == "weight_scale_inv" else None)


def float8_tensor(name: str, weight: RawTensor, scale: RawTensor, block: tuple[int, int] | None) -> QuantizedTensor:
    """A float8 weight and its scales: one a block, or without blocks one a row or one in all."""
    N, K = check_matrix(weight)
    if block is not None:
        blocks = Blocks.of(block, K)
        group, scales, kind = blocks.group, blocks.scales(scale, N, K), "block"
    else:
        group, kind = K, "tensor" if scale.data.size == 1 else "channel"
        scales = scales_of_rows(scale, N)
    return QuantizedTensor(
        name=name,
        where=weight.field,
        shape=(N, K),
        format=GroupFormat(bits=8, group=group, scale_dtype=FLOAT_DTYPES[scale.dtype], float_codes=True),
        type_name=f"FP8-{kind}",
        nbytes=weight.data.nbytes + scale.data.nbytes,
        codes=lambda rows: np.array(weight.data[rows]),
        scales=scales,
    )


def scales_of_rows(scale: RawTensor, N: int) -> ReadRows:
    """Scales `[N]`, `[N, 1]`, or one in all."""
    check_shape(scale, (), (1,), (1, 1), (N,), (N, 1))
    return row_scales(scale, N)


def block_shape(config: Section, key: str) -> tuple[int, int] | None:
    """Rows and columns of a block, None where there is no such key."""
    value = config.values.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(size) is int for size in value):
        raise WeightFileError(config.field(key), value, "must be two whole numbers, rows and columns")
    if len(value) != 2 or not all(1 <= size < 2**31 for size in value):
        raise UnsupportedModelError(config.field(key), value, "must be rows and columns of a block, at least 1 each")
    return value[0], value[1]
