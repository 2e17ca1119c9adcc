"""Tensors of a checkpoint in HF layout as `StoredTensor`s: plain ones, and quantized ones put together of their parts.

Owns the parts of a module with the checks of their types and shapes, and the formula that all formats share. What the
parts of a format are called and how they are packed is the business of the `hf_*` module of its family.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.checkpoint import Floats, Permutation, Rows
from atoma_jax.loading.hf.safetensors import RawTensor
from atoma_jax.quant.groups import BF16, F16, F32, Factors, GroupCodes, GroupFormat

_Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
ReadRows: TypeAlias = Callable[[Rows], _Array]
ActivationScheme: TypeAlias = Literal["int8_token"] | None

FLOATS = ("F32", "F16", "BF16")
FLOAT_DTYPES = {"F32": F32, "F16": F16, "BF16": BF16}


@runtime_checkable  # as the types of arguments are checked while tests run
class Scheme(Protocol):
    """How the linear layers of a model are quantized, from its `quantization_config`."""

    @property
    def activation_scheme(self) -> ActivationScheme:
        """How the inputs of every quantized layer are quantized while the model runs."""
        ...

    def assemble(self, module: "Module") -> "QuantizedTensor | None":
        """Takes the parts of a quantized weight out of a module; None, and nothing taken, where it has none."""
        ...


class Module:
    """The tensors of one module that nobody has taken yet, by their last name: `qweight`, `bias`."""

    def __init__(self, name: str, parts: dict[str, RawTensor]):
        """`name` is what stands before the last dot; there is at least one part."""
        self.name = name
        self.parts = parts
        self._path = next(iter(parts.values())).path

    def __contains__(self, part: object) -> bool:
        """Whether the part is there still."""
        return part in self.parts

    def take(self, part: str, dtypes: Collection[str]) -> RawTensor:
        """A part of one of the dtypes."""
        tensor = self.parts.pop(part, None)
        if tensor is None:
            field = f"{self._path}: tensor '{self.name}.{part}'"
            raise WeightFileError(field, None, "is missing; the layer is quantized and cannot be read without it")
        if tensor.dtype not in dtypes:
            raise WeightFileError(f"{tensor.field} dtype", tensor.dtype, f"must be {' or '.join(dtypes)}")
        return tensor

    def drop(self, *parts: str) -> None:
        """Takes what is not needed here, such as scales of activations, which stay unquantized."""
        for part in parts:
            self.parts.pop(part, None)


def check_shape(tensor: RawTensor, *allowed: tuple[int, ...]) -> None:
    """Raises WeightFileError unless the tensor has one of the shapes."""
    if tensor.shape not in allowed:
        shapes = " or ".join(str(list(shape)) for shape in allowed)
        raise WeightFileError(f"{tensor.field} shape", tensor.shape, f"must be {shapes}")


def check_matrix(tensor: RawTensor) -> tuple[int, int]:
    """The two dimensions of a tensor that has two, neither of them 0."""
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise WeightFileError(f"{tensor.field} shape", tensor.shape, "must have two dimensions, neither of them 0")
    return tensor.shape


def check_group(tensor: RawTensor, K: int, group: int) -> int:
    """Neighbours along K that share a scale, for a config's group size, of which 0 stands for a whole row."""
    group = group or K
    if K % group:
        raise WeightFileError(f"{tensor.field} shape", tensor.shape, f"must have a multiple of {group} inputs, not {K}")
    return group


def widen(values: _Array, dtype: str) -> Floats:
    """Floats of a file as f32, which holds all of them exactly. The result owns its memory."""
    if dtype != "BF16":
        return values.astype(np.float32)
    words = values.astype(np.uint32)
    words <<= 16
    return words.view(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class DenseTensor:
    """Plain floats: a `StoredTensor`."""

    raw: RawTensor

    def __post_init__(self) -> None:
        if self.raw.dtype not in FLOATS:
            problem = f"is no part of a weight that is implemented; a tensor by itself must be {', '.join(FLOATS)}"
            raise UnsupportedModelError(f"{self.raw.field} dtype", self.raw.dtype, problem)

    @property
    def name(self) -> str:
        """As in the file."""
        return self.raw.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost first."""
        return self.raw.shape

    @property
    def format(self) -> None:
        """Nothing is quantized."""
        return

    @property
    def type_name(self) -> str:
        """The file's name of the type."""
        return self.raw.dtype

    @property
    def float_dtype(self) -> np.dtype[Any]:
        """The file's."""
        return FLOAT_DTYPES[self.raw.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.raw.data.nbytes

    @property
    def permutation(self) -> None:
        """Columns are in the order of inputs."""
        return

    def decode(self, rows: Rows) -> GroupCodes:
        """Only quantized tensors have codes."""
        raise AssertionError(f"{self.name} has no codes, of rows {rows} or others: use dequantize")

    def dequantize(self, rows: Rows) -> Floats:
        """Exact f32 values `[rows, K]`; a vector is one row."""
        K = self.shape[-1] if self.shape else 1
        by_row = self.raw.data.reshape(self.raw.data.size // K if K else 0, K)
        return widen(by_row[rows], self.raw.dtype)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class QuantizedTensor:
    """A quantized weight put together of its parts: a `StoredTensor`.

    value = scale · (number − zero) in f32. With zero points of its own, a group has mins of scale · zero: with f16 and
    bf16 scales each product is exact, and so is their difference; f32 scales round each, and `decode` then differs
    from `dequantize` by that.
    """

    name: str  # X.weight
    where: str  # file and tensor, for errors
    shape: tuple[int, int]  # [N, K]
    format: GroupFormat
    type_name: str
    nbytes: int
    codes: ReadRows  # [n, K], columns as they are stored
    scales: ReadRows  # f32 [n, K/group]
    zeros: ReadRows | None = None  # zero points of codes [n, K/group]; without mins they must be the format's
    permutation: Permutation | None = None  # stored column j, once groups are neighbours, is input [j]

    @property
    def float_dtype(self) -> np.dtype[Any]:
        """Its values are products."""
        return F32

    def decode(self, rows: Rows) -> GroupCodes:
        """Rows with groups of neighbours. Thread-safe; results own their memory."""
        codes = self.codes(rows)
        if self.permutation is not None:
            codes = np.take(codes, self.permutation, axis=1)  # a quarter of the time that indexing takes
        scales, mins = self.scales(rows), None
        if self.zeros is not None:
            zeros = self.zeros(rows)
            if self.format.has_mins:
                with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale may be infinite
                    mins = Factors(scales * (zeros.astype(np.float32) - np.float32(self.format.zero)))
            elif (zeros != self.format.zero).any():
                wrong = int(zeros[zeros != self.format.zero][0])
                problem = f"must be {self.format.zero} in every group, as the config says that the weight is symmetric"
                raise WeightFileError(f"{self.where} zero point", wrong, problem)
        return GroupCodes(codes=codes, scales=Factors(scales), mins=mins, format=self.format)

    def dequantize(self, rows: Rows) -> Floats:
        """Exact f32 values `[rows, K]`, inputs in their own order."""
        stored = self.decode(rows)
        if self.zeros is not None and self.format.has_mins:
            zeros, scales = self.zeros(rows).astype(np.float32), stored.scales.values
            by_group = stored.codes.astype(np.float32).reshape(*scales.shape, self.format.group)  # [n, K/g, g]
            by_group -= zeros[..., None]
            with np.errstate(invalid="ignore", over="ignore"):
                by_group *= scales[..., None]
            values = by_group.reshape(stored.codes.shape)
        else:
            values = stored.values()
        if self.permutation is None:
            return values
        unpermuted = np.empty_like(values)
        unpermuted[:, self.permutation] = values
        return unpermuted


def integer_format(bits: int, group: int, scales: RawTensor, *, symmetric: bool) -> GroupFormat:
    """Of integers with one zero point for all groups, or one for each.

    Eight-bit numbers are taken around 128 all the same, so that they fit signed bytes; four bits do as they are.
    """
    dtype, zero = FLOAT_DTYPES[scales.dtype], 2 ** (bits - 1)
    if symmetric:
        return GroupFormat(bits=bits, group=group, zero=zero, scale_dtype=dtype)
    return GroupFormat(bits=bits, group=group, zero=zero if bits == 8 else 0, scale_dtype=dtype, min_dtype=F32)


# How the scales of a weight [N, K] lie, as functions of rows


def grouped_scales(scale: RawTensor) -> ReadRows:
    """`[N, groups]`."""
    return lambda rows: widen(scale.data[rows], scale.dtype)


def transposed_scales(scale: RawTensor) -> ReadRows:
    """`[groups, N]`."""
    return lambda rows: widen(np.ascontiguousarray(scale.data[:, rows].T), scale.dtype)


def row_scales(scale: RawTensor, N: int) -> ReadRows:
    """One of each row, `[N]` or `[N, 1]`, or one of the whole tensor, of any shape."""
    by_row = np.broadcast_to(scale.data.reshape(-1, 1), (N, 1))
    return lambda rows: widen(by_row[rows], scale.dtype)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of rows × columns that share a scale, and how they become groups along K."""

    shape: tuple[int, int]  # of a block
    group: int  # divides K and a block's columns: blocks at the right edge may be cut

    @classmethod
    def of(cls, shape: tuple[int, int], K: int) -> "Blocks":
        """For a matrix with K inputs."""
        return cls(shape, math.gcd(shape[1], K))

    def scales(self, scale: RawTensor, N: int, K: int) -> ReadRows:
        """Of a tensor `[ceil(N / rows), ceil(K / columns)]`."""
        height, width = self.shape
        check_shape(scale, (-(-N // height), -(-K // width)))
        rows_of_blocks, columns = np.arange(N) // height, np.arange(0, K, self.group) // width
        return lambda rows: widen(scale.data[rows_of_blocks[rows][:, None], columns], scale.dtype)
