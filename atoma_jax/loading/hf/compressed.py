"""Weights in the formats of compressed-tensors (llm-compressor, vLLM): integers packed in words or bytes, and float8.

| format | codes | zero point of codes |
|---|---|---|
| pack-quantized | i32 `weight_packed` [N, ceil(K·bits/32)] | 2^(bits−1), or `weight_zero_point`, packed along N |
| int-quantized | i8 `weight` [N, K] | none, or i8 `weight_zero_point` |
| float-quantized | e4m3 `weight` [N, K] | none |
| naive-quantized | either of the last two | |

`weight_scale` multiplies; it has one number for a group, a row, a block or the whole weight. Of the activations only
int8 by token is recorded; others stay in the engine's own type, wider than what the file asks for.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.checkpoint import Permutation
from atoma_jax.loading.hf.fp8 import block_shape, float8_tensor, scales_of_rows
from atoma_jax.loading.hf.gptq import order_of_groups
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
    grouped_scales,
    integer_format,
)
from atoma_jax.loading.json_file import Section
from atoma_jax.loading.name_patterns import NamePatterns
from atoma_jax.quant.packed import natural_order, unpack_columns, unpack_rows

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_ACTIVATIONS = ("input_scale", "input_zero_point")
_SIGN = np.uint8(128)


@dataclass(frozen=True, slots=True)
class _Weights:
    """How the weights of one group of layers are quantized."""

    format: str
    kind: Literal["int", "float"]
    bits: int
    symmetric: bool
    strategy: str
    group: int  # 0: a whole row
    block: tuple[int, int] | None

    @classmethod
    def of(cls, group: Section, default_format: str) -> "_Weights":
        found = group.choice("format", default_format, _FORMATS)
        config = group.section("weights")
        kind: Any = config.choice("type", "int", ("int", "float"))
        bits = config.integer("num_bits", 8)
        widths = (8,) if kind == "float" else (2, 4, 8) if found == "pack-quantized" else tuple(range(2, 9))
        if bits not in widths:
            problem = f"is not implemented for {kind} weights; those that are: {', '.join(map(str, widths))}"
            raise UnsupportedModelError(config.field("num_bits"), bits, problem)
        symmetric = config.boolean("symmetric", True)
        if kind == "float" and not symmetric:
            raise UnsupportedModelError(
                config.field("symmetric"), symmetric, "floats with zero points are not implemented"
            )
        wanted = {"pack-quantized": "int", "int-quantized": "int", "float-quantized": "float"}.get(found, kind)
        if kind != wanted:
            raise WeightFileError(config.field("type"), kind, f"must be {wanted} in the format {found}")
        config.refuse("dynamic", "weights with scales of the moment are not implemented")
        size = config.integer("group_size", -1, minimum=-1)
        inferred = "group" if size > 0 else "channel" if config.values.get("group_size") == -1 else "tensor"
        strategies = ("tensor", "channel", "block") if kind == "float" else ("tensor", "channel", "group")
        strategy = config.choice("strategy", inferred, strategies)
        block = block_shape(config, "block_structure")
        if (strategy == "block" and block is None) or (strategy == "group" and size < 1):
            missing = "block_structure" if strategy == "block" else "group_size"
            raise WeightFileError(config.field(missing), config.values.get(missing), f"must be given for a {strategy}")
        return cls(found, kind, bits, symmetric, strategy, size if strategy == "group" else 0, block)


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers that are quantized alike."""

    targets: NamePatterns
    weights: _Weights
    activation_scheme: ActivationScheme

    @classmethod
    def of(cls, config: Section, default_format: str) -> "_Group":
        config.refuse("output_activations", "quantized outputs are not implemented")
        if not config.values.get("weights"):
            raise UnsupportedModelError(
                config.field("weights"), None, "groups without quantized weights are not implemented"
            )
        targets = NamePatterns.of(config.field("targets"), config.texts("targets"))
        return cls(targets, _Weights.of(config, default_format), _activations(config.section("input_activations")))

    def rank(self, name: str, field: str) -> int:
        """How closely the targets name a layer: 3 by name, 2 by expression, 1 by class, 0 not at all."""
        if name in self.targets.names:
            return 3
        if self.targets.matches(name, field):
            return 2
        # No classes are known here. A quantized weight is one of the targeted class, or its file contradicts itself.
        # A class has a capital and no dot; "lm_head" is a layer.
        return int(any("." not in target and target[:1].isupper() for target in self.targets.names))


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """A `Scheme`."""

    where: str
    groups: tuple[_Group, ...]
    ignored: NamePatterns

    @classmethod
    def of(cls, config: Section) -> "CompressedTensors":
        """From a `quantization_config`.

        Raises:
            UnsupportedModelError: a format or feature that is not implemented.
            WeightFileError: a value has the wrong type.
        """
        config.refuse("kv_cache_scheme", "scales of the KV cache are not implemented")
        config.refuse("transform_config", "transformed activations are not implemented")
        config.section("sparsity_config").choice("format", "dense", ("dense",))
        whole = config.text("format", "pack-quantized").lower()
        groups = config.section("config_groups")
        if not groups.values:
            raise UnsupportedModelError(config.field("config_groups"), None, "must name at least one group of layers")
        return cls(
            config.where,
            tuple(_Group.of(groups.section(name), whole) for name in groups.values),
            NamePatterns.of(config.field("ignore"), config.texts("ignore")),
        )

    @property
    def activation_scheme(self) -> ActivationScheme:
        """That of all groups, None where they differ."""
        first = self.groups[0].activation_scheme
        return first if all(group.activation_scheme == first for group in self.groups) else None

    def assemble(self, module: Module) -> QuantizedTensor | None:
        """Takes weight_packed or weight, weight_scale, weight_zero_point, weight_shape and weight_g_idx."""
        stored = module.parts.get("weight_packed") or module.parts.get("weight")
        if stored is None or stored.dtype in FLOATS:
            return None
        weights = self._weights(module.name, stored)
        module.drop(*_ACTIVATIONS)
        if weights.format == "pack-quantized":
            return _packed(module, weights)
        return _float8(module, weights) if weights.kind == "float" else _integers(module, weights)

    def _weights(self, name: str, stored: RawTensor) -> _Weights:
        """How a layer is quantized: as the group says that names it most closely."""
        if name in self.ignored.names or self.ignored.matches(name, stored.field):
            raise WeightFileError(
                stored.field, stored.dtype, f"must be plain floats, as {self.where}.ignore names {name}"
            )
        ranks = [group.rank(name, stored.field) for group in self.groups]
        best = max(ranks)
        if best == 0:
            raise WeightFileError(stored.field, stored.dtype, f"no group of {self.where}.config_groups names {name}")
        found = {group.weights for group, rank in zip(self.groups, ranks, strict=True) if rank == best}
        if len(found) > 1:
            problem = f"several groups of {self.where}.config_groups name {name}, and they differ"
            raise UnsupportedModelError(stored.field, stored.dtype, problem)
        return found.pop()


def _activations(config: Section) -> ActivationScheme:
    """Recorded where it is int8 by token, symmetric, with scales of the moment."""
    wanted = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    given = {**({"num_bits": 8, "type": "int", "symmetric": True} if config.values else {}), **config.values}
    return "int8_token" if all(given.get(key) == value for key, value in wanted.items()) else None


def _packed(module: Module, weights: _Weights) -> QuantizedTensor:
    """Integers in 32-bit words."""
    words = module.take("weight_packed", ("I32",))
    size = module.take("weight_shape", ("I64", "I32"))
    check_shape(size, (2,))
    N, K = (int(length) for length in size.data)
    bits: Any = weights.bits
    if K < 1:
        raise WeightFileError(f"{size.field} value", (N, K), "must be rows and columns, at least 1 each")
    check_matrix(words)
    check_shape(words, (N, -(-K * bits // 32)))
    group = check_group(words, K, weights.group)
    scale, scales = _scales(module, weights, N, K // group)
    parts, zeros, permutation = [words, scale], None, None
    if not weights.symmetric or "weight_zero_point" in module:
        zero = module.take("weight_zero_point", ("I32",))
        check_shape(zero, (-(-N * bits // 32), K // group))
        parts.append(zero)
        zeros = lambda rows: unpack_columns(zero.data.T, _bounded(rows, N), bits, natural_order(bits))  # noqa: E731
    if "weight_g_idx" in module:
        parts.append(module.take("weight_g_idx", ("I32", "I64")))
        permutation = _order(parts[-1], K, group)
    return QuantizedTensor(
        name=f"{module.name}.weight",
        where=words.field,
        shape=(N, K),
        format=integer_format(bits, group, scale, symmetric=weights.symmetric),
        type_name=f"INT{bits}-packed",
        nbytes=sum(part.data.nbytes for part in parts),
        codes=lambda rows: unpack_rows(words.data[rows], bits)[:, :K],
        scales=scales,
        zeros=zeros,
        permutation=permutation,
    )


def _integers(module: Module, weights: _Weights) -> QuantizedTensor:
    """Signed integers, one a byte whatever their width."""
    weight = module.take("weight", ("I8",))
    N, K = check_matrix(weight)
    group = check_group(weight, K, weights.group)
    scale, scales = _scales(module, weights, N, K // group)
    parts, zeros = [weight, scale], None
    if not weights.symmetric or "weight_zero_point" in module:
        zero = module.take("weight_zero_point", ("I8",))
        check_shape(zero, scale.shape)
        parts.append(zero)
        by_row = np.broadcast_to(zero.data.reshape(-1, K // group), (N, K // group))
        zeros = lambda rows: by_row[rows].view(np.uint8) ^ _SIGN  # noqa: E731
    return QuantizedTensor(
        name=f"{module.name}.weight",
        where=weight.field,
        shape=(N, K),
        format=integer_format(8, group, scale, symmetric=weights.symmetric),
        type_name="INT8",
        nbytes=sum(part.data.nbytes for part in parts),
        codes=lambda rows: weight.data[rows].view(np.uint8) ^ _SIGN,  # two's complement, plus 128
        scales=scales,
        zeros=zeros,
    )


def _float8(module: Module, weights: _Weights) -> QuantizedTensor:
    weight, scale = module.take("weight", ("F8_E4M3",)), module.take("weight_scale", FLOATS)
    module.drop("weight_zero_point")  # older files have one, of zeros
    return float8_tensor(f"{module.name}.weight", weight, scale, weights.block)


def _scales(module: Module, weights: _Weights, N: int, groups: int) -> tuple[RawTensor, ReadRows]:
    scale = module.take("weight_scale", FLOATS)
    if weights.strategy == "group":
        check_shape(scale, (N, groups))
        return scale, grouped_scales(scale)
    return scale, scales_of_rows(scale, N)


def _order(index: RawTensor, K: int, group: int) -> Permutation | None:
    """As GPTQ's; −1 in a place stands for an order that was never set."""
    check_shape(index, (K,))
    return None if (index.data == -1).any() else order_of_groups(index, K, group)


def _bounded(rows: Any, N: int) -> Any:
    """A slice within the rows that there are: packed words have room for more."""
    return slice(*rows.indices(N)) if isinstance(rows, slice) else rows
