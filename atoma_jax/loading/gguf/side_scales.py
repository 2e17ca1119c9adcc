"""Factors that a GGUF file keeps beside a weight: `X.scale`, one float for the matrix `X.weight` or one for each of its
experts, as converters write them of NVFP4 and BitNet checkpoints. A product is y = (W · x) · factor, which is
(factor · W) · x: the factor goes into the scales of the weight's groups, and nothing multiplies by it later.

Beside it there may be `X.input_scale`, for devices that round activations to FP4. Here they stay as they are, and it
says nothing. Names and meaning are llama.cpp's (`src/llama-model.cpp`, `build_lora_mm` of `src/llama-graph.cpp`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from atoma_jax.errors import WeightFileError
from atoma_jax.loading.checkpoint import Floats, Rows, StoredTensor
from atoma_jax.loading.gguf.file import GGUFFile, GGUFTensor
from atoma_jax.loading.gguf.metadata import Metadata
from atoma_jax.quant.groups import F32, Factors, GroupCodes, GroupFormat

_WEIGHT, _SCALE, _INPUT_SCALE = ".weight", ".scale", ".input_scale"
_EMBEDDING = "token_embd.weight"  # looked up, not multiplied: has no factor


@dataclass(frozen=True, slots=True, eq=False)
class ScaledTensor:
    """A tensor times its factors: a `StoredTensor`.

    Scales become float32, where a format's own are narrower floats: a factor has digits of its own. Integer scales
    stay, as the factor goes into what they are multiplied by. Each product is rounded once, to float32.
    """

    base: GGUFTensor
    factors: Float32[np.ndarray, " E"]  # one, or one for each of the leading axis

    @property
    def name(self) -> str:
        """The weight's."""
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        """As of the weight."""
        return self.base.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the file, those of the factors included."""
        return self.base.nbytes + self.factors.nbytes

    @property
    def format(self) -> GroupFormat | None:
        """As of the weight, with room for the factors."""
        own = self.base.format
        if own is None or own.supergroup is not None:
            return own
        return replace(own, scale_dtype=F32, min_dtype=None if own.min_dtype is None else F32)

    @property
    def type_name(self) -> str:
        """The weight's."""
        return self.base.type_name

    @property
    def float_dtype(self) -> np.dtype[Any]:
        """The factors widen it."""
        return F32

    @property
    def permutation(self) -> None:
        """GGUF stores columns in the order of inputs."""
        return

    def decode(self, rows: Rows) -> GroupCodes:
        """As `StoredTensor.decode`."""
        found, kind = self.base.decode(rows), self.format
        assert kind is not None
        by_row = self._of_rows(rows)
        mins = None if found.mins is None else _scaled(found.mins, by_row)
        return replace(found, scales=_scaled(found.scales, by_row), mins=mins, format=kind)

    def dequantize(self, rows: Rows) -> Floats:
        """As `StoredTensor.dequantize`."""
        if self.format is None:
            return self.base.dequantize(rows) * self._of_rows(rows)
        return self.decode(rows).values()

    def _of_rows(self, rows: Rows) -> Float32[np.ndarray, "N 1"]:
        total = len(self.base.data)
        index = np.arange(total)[rows] if isinstance(rows, slice) else rows
        return self.factors[index // (total // len(self.factors))][:, None]


def _scaled(factors: Factors, by_row: Float32[np.ndarray, "N 1"]) -> Factors:
    if factors.supers is not None:
        return Factors(factors.values, factors.supers * by_row)
    return Factors(factors.values.astype(np.float32) * by_row)


@dataclass(frozen=True, slots=True)
class ScaledFile:
    """A GGUF file whose factors are in its weights: a `Checkpoint`."""

    path: Path
    metadata: Metadata
    tensors: Mapping[str, StoredTensor]


def with_side_scales(file: GGUFFile) -> GGUFFile | ScaledFile:
    """The file as the loader takes it; itself, where it has no factors.

    Raises:
        WeightFileError: factors are not as many as a weight has experts, no floats, or not finite.
    """
    weights = {
        name.removesuffix(_WEIGHT): tensor
        for name, tensor in file.tensors.items()
        if name.endswith(_WEIGHT) and len(tensor.shape) > 1 and name != _EMBEDDING
    }
    factors = {name: file.tensors[name + _SCALE] for name in weights if name + _SCALE in file.tensors}
    silent = {name + _INPUT_SCALE for name in weights if name + _INPUT_SCALE in file.tensors}
    if not factors and not silent:
        return file
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in file.tensors.items():
        stem, _, kind = name.rpartition(".")
        if name in silent or (kind == "scale" and stem in factors):
            continue
        of_weight = factors.get(stem) if kind == "weight" else None
        tensors[name] = tensor if of_weight is None else ScaledTensor(tensor, _read(file, of_weight, tensor))
    return ScaledFile(file.path, file.metadata, tensors)


def _read(file: GGUFFile, stored: GGUFTensor, weight: GGUFTensor) -> Float32[np.ndarray, " E"]:
    field = f"{file.path}: tensor {stored.name!r}"
    shapes = [(1,), weight.shape[:1]] if len(weight.shape) == 3 else [(1,)]
    if stored.shape not in shapes or stored.format is not None:
        expected = " or ".join(str(shape[0]) for shape in shapes)
        raise WeightFileError(
            f"{field} shape", stored.shape, f"must be {expected} plain floats, as {weight.name!r} has"
        )
    values = stored.dequantize(slice(None)).reshape(-1)
    if not np.isfinite(values).all():
        raise WeightFileError(field, values.tolist()[:4], "must be finite")
    return values
