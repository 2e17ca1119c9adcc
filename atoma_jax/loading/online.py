"""Quantizes the dense weights of a checkpoint as they are read: the checkpoint, seen as if it were quantized."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from atoma_jax.errors import ConfigError
from atoma_jax.loading.checkpoint import Checkpoint, Floats, Permutation, Rows, StoredTensor
from atoma_jax.loading.weight_sources import WeightSource
from atoma_jax.models.params import ParamSpec
from atoma_jax.quant.groups import F32, GroupCodes, GroupFormat
from atoma_jax.quant.online import LoadScheme, quantize_rows, scheme_format


@dataclass(frozen=True, slots=True)
class QuantizedOnLoad:
    """A dense tensor whose rows are quantized when they are read: a `StoredTensor`."""

    dense: StoredTensor
    scheme: LoadScheme

    @property
    def name(self) -> str:
        """Of the dense tensor."""
        return self.dense.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense tensor."""
        return self.dense.shape

    @property
    def format(self) -> GroupFormat | None:
        """What the scheme makes of its rows."""
        return scheme_format(self.scheme, self.shape[-1])

    @property
    def type_name(self) -> str:
        """Of the dense tensor, and what becomes of it."""
        return f"{self.dense.type_name} as {self.scheme}"

    @property
    def nbytes(self) -> int:
        """Of the dense tensor."""
        return self.dense.nbytes

    @property
    def float_dtype(self) -> np.dtype[Any]:
        """Its values are products."""
        return F32

    @property
    def permutation(self) -> Permutation | None:
        """Columns are in the order of inputs."""
        return None

    def decode(self, rows: Rows) -> GroupCodes:
        """Rows, quantized now."""
        return quantize_rows(self.dense.dequantize(rows), self.scheme, f"tensor {self.name!r}")

    def dequantize(self, rows: Rows) -> Floats:
        """The values that the codes stand for."""
        return self.decode(rows).values()


@dataclass(frozen=True, slots=True)
class OnlineCheckpoint:
    """A checkpoint some of whose tensors are quantized when they are read: a `Checkpoint`."""

    path: Path
    tensors: Mapping[str, StoredTensor]


SCHEMES: Mapping[str, LoadScheme] = MappingProxyType(
    {"int8": "int8", "int4": "int4", "fp8": "fp8", "ternary": "ternary", "w8a8": "int8_channel"}
)


def quantized_on_load(
    checkpoint: Checkpoint, sources: Mapping[str, WeightSource], wanted: Mapping[str, ParamSpec], option: str
) -> OnlineCheckpoint:
    """The checkpoint with the dense matrices of its layers quantized; embeddings, head and routers stay as they are.

    Args:
        checkpoint: open; what is quantized in it already stays so.
        sources: where each weight of the model is in it.
        wanted: `params.specs_of(model)`.
        option: how, one of `config.ModelConfig.quantization`.

    Raises:
        ConfigError: there is no dense matrix, or one does not fit the scheme.
    """
    names = {
        part.tensor
        for path, want in wanted.items()
        if want.quantizable and want.stacked
        for parts in sources[path].blocks
        for part in parts
    }
    dense = [name for name in names if checkpoint.tensors[name].format is None]
    if not dense:
        kinds = sorted({checkpoint.tensors[name].type_name for name in names})
        problem = f"has nothing to quantize: the layers of {checkpoint.path.name} are {', '.join(kinds)} already"
        raise ConfigError("quantization", option, f"{problem}; leave it out, or give a dense model")
    changed = {name: QuantizedOnLoad(checkpoint.tensors[name], SCHEMES[option]) for name in dense}
    for tensor in changed.values():
        _ = tensor.format  # refuses inputs that do not fit, before anything is read
    return OnlineCheckpoint(checkpoint.path, {**checkpoint.tensors, **changed})
