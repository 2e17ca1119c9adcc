"""Weights of four or eight bits as AutoAWQ and GPTQ write them: codes and zero points in 32-bit words, matrices [K, N].

| | codes | zero points | scales | source |
|---|---|---|---|---|
| AWQ "gemm" | i32 [K, N/8] along N, in `AWQ_ORDER` | i32 [K/G, N/8], likewise | [K/G, N] | AutoAWQ, `WQLinear_GEMM` |
| GPTQ | i32 [K·bits/32, N] along K | i32 [K/G, N·bits/32] along N | [K/G, N] | AutoGPTQ, GPTQModel |

`gptq_v2` stores zero points as they are, `gptq` stores them less one. That subtraction was one of whole words: the
field above a zero point of 0 lends it a one, so adding whole words brings every zero point back.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.checkpoint import Permutation, Rows
from atoma_jax.loading.hf.safetensors import RawTensor
from atoma_jax.loading.hf.tensors import (
    FLOATS,
    ActivationScheme,
    Module,
    QuantizedTensor,
    ReadRows,
    check_group,
    check_matrix,
    check_shape,
    integer_format,
    transposed_scales,
)
from atoma_jax.loading.json_file import Section
from atoma_jax.quant.packed import AWQ_ORDER, natural_order, unpack_columns, unpack_rows


@dataclass(frozen=True, slots=True)
class AWQ:
    """A `Scheme`."""

    group: int  # 0: a whole row
    symmetric: bool
    activation_scheme: ActivationScheme = None

    @classmethod
    def of(cls, config: Section) -> "AWQ":
        """From a `quantization_config`.

        Raises:
            UnsupportedModelError: a version, width or feature that is not implemented.
            WeightFileError: a value has the wrong type.
        """
        config.choice("version", "gemm", ("gemm",))
        config.choice("format", "gemm", ("gemm",))
        _integer_choice(config, "w_bit" if "w_bit" in config.values else "bits", (4,), default=4)
        size = "q_group_size" if "q_group_size" in config.values else "group_size"
        return cls(group=_group_size(config, size), symmetric=not config.boolean("zero_point", True))

    def assemble(self, module: Module) -> QuantizedTensor | None:
        """Takes qweight, qzeros and scales."""
        if "qweight" not in module:
            return None
        words = module.take("qweight", ("I32",))
        K, N = check_matrix(words)[0], words.shape[1] * 8
        group = check_group(words, K, self.group)
        scales = module.take("scales", FLOATS)
        check_shape(scales, (K // group, N))
        parts, zeros = [words, scales], None
        if not self.symmetric or "qzeros" in module:
            packed = module.take("qzeros", ("I32",))
            check_shape(packed, (K // group, N // 8))
            parts.append(packed)
            zeros = _columns(packed, 4, AWQ_ORDER)
        return QuantizedTensor(
            name=f"{module.name}.weight",
            where=words.field,
            shape=(N, K),
            format=integer_format(4, group, scales, symmetric=self.symmetric),
            type_name="AWQ-4bit",
            nbytes=sum(part.data.nbytes for part in parts),
            codes=_columns(words, 4, AWQ_ORDER),
            scales=transposed_scales(scales),
            zeros=zeros,
        )


@dataclass(frozen=True, slots=True)
class GPTQ:
    """A `Scheme`."""

    bits: Literal[2, 4, 8]
    group: int  # 0: a whole row
    symmetric: bool
    zeros_less_one: bool
    activation_scheme: ActivationScheme = None

    @classmethod
    def of(cls, config: Section) -> "GPTQ":
        """From a `quantization_config`.

        Raises:
            UnsupportedModelError: a format, width or feature that is not implemented.
            WeightFileError: a value has the wrong type.
        """
        key = "checkpoint_format" if config.values.get("checkpoint_format") is not None else "format"
        version = config.choice(key, "gptq", ("gptq", "gptq_v2"))
        config.choice("pack_dtype", "int32", ("int32",))
        config.refuse(
            "is_marlin_format", "weights in the order of Marlin's kernels are not implemented; take plain GPTQ"
        )
        rules = config.section("dynamic").values
        changed = next((rule for rule in rules if not rule.startswith("-:")), None)
        if changed is not None:
            problem = "a layer with settings of its own is not implemented; only '-:' rules are, which skip layers"
            raise UnsupportedModelError(config.field("dynamic"), changed, problem)
        bits: Any = _integer_choice(config, "bits", (2, 4, 8))
        return cls(bits, _group_size(config, "group_size"), config.boolean("sym", True), version == "gptq")

    def assemble(self, module: Module) -> QuantizedTensor | None:
        """Takes qweight, qzeros, scales and g_idx."""
        if "qweight" not in module:
            return None
        words = module.take("qweight", ("I32",))
        per_word = 32 // self.bits
        K, N = check_matrix(words)[0] * per_word, words.shape[1]
        group = check_group(words, K, self.group)
        if N % per_word:
            problem = f"must have a multiple of {per_word} outputs, as zero points share words"
            raise WeightFileError(f"{words.field} shape", words.shape, problem)
        scales, packed = module.take("scales", FLOATS), module.take("qzeros", ("I32",))
        check_shape(scales, (K // group, N))
        check_shape(packed, (K // group, N // per_word))
        parts, permutation = [words, scales, packed], None
        if "g_idx" in module:
            parts.append(module.take("g_idx", ("I32", "I64")))
            permutation = order_of_groups(parts[-1], K, group)
        bits, ones = self.bits, sum(1 << field * self.bits for field in range(per_word))
        return QuantizedTensor(
            name=f"{module.name}.weight",
            where=words.field,
            shape=(N, K),
            format=integer_format(bits, group, scales, symmetric=self.symmetric),
            type_name=f"GPTQ-{bits}bit",
            nbytes=sum(part.data.nbytes for part in parts),
            codes=lambda rows: unpack_rows(words.data[:, rows].T, bits),
            scales=transposed_scales(scales),
            zeros=_columns(packed, bits, natural_order(bits), ones if self.zeros_less_one else 0),
            permutation=permutation,
        )


def order_of_groups(index: RawTensor, K: int, group: int) -> Permutation | None:
    """The order of inputs in which groups are neighbours, of a group's number for each input; None where they are.

    The one part that is read when a model is opened: 4 bytes an input, and the order belongs to the header's facts.
    """
    check_shape(index, (K,))
    groups = np.array(index.data, np.int64)
    if groups.min() < 0 or groups.max() >= K // group:
        wrong = int(groups.min() if groups.min() < 0 else groups.max())
        raise WeightFileError(f"{index.field} value", wrong, f"must be the number of a group in [0, {K // group - 1}]")
    sizes = np.bincount(groups, minlength=K // group)
    if (sizes != group).any():
        problem = f"must have {group} inputs in each group; group {int((sizes != group).argmax())} has another number"
        raise WeightFileError(f"{index.field} value", int(sizes[sizes != group][0]), problem)
    order = np.argsort(groups, kind="stable").astype(np.int32)
    return None if (order == np.arange(K)).all() else order


def _columns(packed: RawTensor, bits: int, order: tuple[int, ...], add: int = 0) -> ReadRows:
    def read(rows: Rows) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return unpack_columns(packed.data, rows, bits, order, add)

    return read


def _group_size(config: Section, key: str) -> int:
    """In inputs; 0 for a whole row, which files say as −1."""
    size = config.integer(key, 128, minimum=-1)
    if size == 0:
        raise WeightFileError(config.field(key), size, "must be positive, or -1 for whole rows")
    return max(size, 0)


def _integer_choice(config: Section, key: str, implemented: tuple[int, ...], default: int | None = None) -> int:
    bits = config.integer(key, default)
    if bits not in implemented:
        problem = f"is not implemented; those that are: {', '.join(map(str, implemented))}"
        raise UnsupportedModelError(config.field(key), bits, problem)
    return bits
