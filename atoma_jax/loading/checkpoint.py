"""What the loader asks of a model on disk, whatever its container: named tensors that say their form before any byte of
them is read. GGUF files (`gguf/file.py`) and folders of safetensors (`hf/checkpoint.py`) are checkpoints.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from atoma_jax.quant.groups import GroupCodes, GroupFormat

Rows: TypeAlias = np.ndarray[Any, np.dtype[np.int64]] | slice  # indices, or neighbours without a step
Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
Permutation: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]


@runtime_checkable  # as the types of arguments are checked while tests run
class StoredTensor(Protocol):
    """One logical tensor. What a container spreads over several of its own, such as codes and scales, is one here."""

    @property
    def name(self) -> str:
        """As names of weights are looked up; `X.weight` for a quantized layer, whatever its parts are called."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost first: [N, K] for a matrix with K inputs, [E, N, K] for one of each expert, [n] for a vector."""
        ...

    @property
    def format(self) -> GroupFormat | None:
        """How its numbers are quantized; None for plain floats."""
        ...

    @property
    def type_name(self) -> str:
        """What its users call the type: Q4_K, F16, GPTQ-4bit."""
        ...

    @property
    def float_dtype(self) -> np.dtype[Any]:
        """The narrowest of float32, bfloat16 and float16 that holds the values of plain floats; float32 of others."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes in the files, scales and the like included."""
        ...

    @property
    def permutation(self) -> Permutation | None:
        """Where stored columns are not in the order of inputs (GPTQ's act-order): stored column j is input [j]."""
        ...

    def decode(self, rows: Rows) -> GroupCodes:
        """Rows of a quantized tensor, leading axes flattened. Thread-safe; results own their memory."""
        ...

    def dequantize(self, rows: Rows) -> Floats:
        """Exact f32 values `[rows, K]` of a tensor of any kind; a vector is one row. Inputs in their own order."""
        ...


@runtime_checkable
class Checkpoint(Protocol):
    """A model on disk, checked as a whole when it was opened."""

    @property
    def path(self) -> Path:
        """The file or folder, for errors."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """By name."""
        ...
