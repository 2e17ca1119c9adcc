"""Ternary weights of BitNet b1.58 as transformers writes them, `quant_method` "bitnet": four rows a byte, one scale.

A layer of class `bitlinear` divides by `weight_scale`, one of `autobitlinear` multiplies. The inputs of both are
quantized to int8 a token, with 127 / max(|x|, 1e-5) as the scale (transformers, integrations/bitnet.py).
"""

from dataclasses import dataclass

import numpy as np

from atoma_jax.errors import UnsupportedModelError
from atoma_jax.loading.checkpoint import Floats, Rows
from atoma_jax.loading.hf.tensors import (
    FLOAT_DTYPES,
    FLOATS,
    ActivationScheme,
    Module,
    QuantizedTensor,
    check_matrix,
    check_shape,
    row_scales,
)
from atoma_jax.loading.json_file import Section
from atoma_jax.quant.groups import F32, GroupFormat
from atoma_jax.quant.packed import unpack_quarters


@dataclass(frozen=True, slots=True)
class BitNet:
    """A `Scheme`."""

    divides: bool
    activation_scheme: ActivationScheme = "int8_token"

    @classmethod
    def of(cls, config: Section) -> "BitNet":
        """From a `quantization_config`.

        Raises:
            UnsupportedModelError: a mode or feature that is not implemented.
            WeightFileError: a value has the wrong type.
        """
        if config.text("quantization_mode", "offline") != "offline":
            problem = "weights that become ternary while the model runs are not implemented; take the packed model"
            raise UnsupportedModelError(config.field("quantization_mode"), config.values["quantization_mode"], problem)
        config.refuse("use_rms_norm", "a norm inside of quantized layers is not implemented")
        return cls(config.choice("linear_class", "bitlinear", ("bitlinear", "autobitlinear")) == "bitlinear")

    def assemble(self, module: Module) -> QuantizedTensor | None:
        """Takes weight and weight_scale, of a module whose weight is bytes."""
        if "weight" not in module or module.parts["weight"].dtype != "U8":
            return None
        packed, scale = module.take("weight", ("U8",)), module.take("weight_scale", FLOATS)
        quarter, K = check_matrix(packed)
        N = 4 * quarter
        check_shape(scale, (), (1,))
        stored = row_scales(scale, N)

        def inverse(rows: Rows) -> Floats:
            scales = stored(rows)
            with np.errstate(divide="ignore"):  # a damaged scale may be 0
                return np.reciprocal(scales, out=scales)

        return QuantizedTensor(
            name=f"{module.name}.weight",
            where=packed.field,
            shape=(N, K),
            # The inverse of an f16 or bf16 needs all bits of an f32.
            format=GroupFormat(bits=2, group=K, zero=1, scale_dtype=F32 if self.divides else FLOAT_DTYPES[scale.dtype]),
            type_name="BitNet",
            nbytes=packed.data.nbytes + scale.data.nbytes,
            codes=lambda rows: unpack_quarters(packed.data, rows),
            scales=inverse if self.divides else stored,
        )
