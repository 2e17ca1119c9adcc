"""A model and an engine's state cut over a mesh: which logical axes each array has, and what is refused.

Owns the names of axes that no weight declares (layers, slices, pages) and the check that a model's dimensions divide.
From logical to mesh axes is `sharding`'s; where quantized weights can be cut is `quant/cuts.py`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import PartitionSpec

from atoma_jax.engine.sampler_state import SamplerState
from atoma_jax.errors import ConfigError
from atoma_jax.model_spec import ModelSpec
from atoma_jax.models.params import ParamSpec
from atoma_jax.ops import KVPages
from atoma_jax.quant.cuts import SIDES, parts_along_inputs, sides_of
from atoma_jax.quant.qtensor import LayerVariants, QTensor
from sharding.apply import cut, divisors, parts_of
from sharding.errors import ShardingError
from sharding.mesh import MeshShape
from sharding.rules import PRESETS, Rules, partition, preset_of, with_whole_heads


def heads_divide(spec: ModelSpec, mesh: MeshShape) -> bool:
    """Whether heads are cut over `tensor`. Where not, each of its devices has all of them, and all of their cache. The
    same of a model and of what `served_spec` makes of it."""
    tensor, kv_heads = mesh.tensor, spec.num_kv_heads
    return spec.num_heads % tensor == 0 and (kv_heads % tensor == 0 or tensor % kv_heads == 0)


def served_spec(spec: ModelSpec, mesh: MeshShape) -> ModelSpec:
    """The model as all devices of a mesh hold it together: where `tensor` has more devices than there are kv heads,
    each device has a copy of the one that its queries read; a vocabulary is filled up with rows of zeros.

    Raises:
        ConfigError: feed-forward nets or experts do not divide.
    """
    tensor, kv_heads = mesh.tensor, spec.num_kv_heads
    sizes = {"ffn_dim": spec.ffn_dim}
    if spec.experts is not None:
        sizes["ffn_dim"] = spec.experts.ffn_dim
        if spec.experts.shared_ffn_dim:
            sizes["shared_ffn_dim"] = spec.experts.shared_ffn_dim
        if spec.experts.count % mesh.expert:
            _refuse(mesh, "expert", "experts", spec.experts.count)
    elif mesh.expert > 1:
        raise ConfigError("mesh.expert", mesh.expert, f"must be 1: a {spec.architecture} model here has no experts")
    for name, size in sizes.items():
        if size % tensor:
            _refuse(mesh, "tensor", name, size)
    parts = tensor * mesh.fsdp
    return replace(
        spec,
        num_kv_heads=max(kv_heads, tensor) if heads_divide(spec, mesh) else kv_heads,
        vocab_size=-(-spec.vocab_size // parts) * parts,
    )


def _refuse(mesh: MeshShape, axis: str, name: str, size: int) -> None:
    fitting = ", ".join(map(str, divisors(size)))
    raise ConfigError(f"mesh.{axis}", mesh.sizes[axis], f"must divide {name} = {size} of the model: {fitting}")


def device_spec(spec: ModelSpec, mesh: MeshShape, vocab_size: int) -> ModelSpec:
    """The model as one device computes it, of what `served_spec` gave and the vocabulary without what fills it up."""
    tensor, experts = mesh.tensor, spec.experts
    parts = tensor if heads_divide(spec, mesh) else 1
    if experts is not None:
        experts = replace(experts, ffn_dim=experts.ffn_dim // tensor, shared_ffn_dim=experts.shared_ffn_dim // tensor)
    return replace(
        spec,
        vocab_size=vocab_size,
        num_heads=spec.num_heads // parts,
        num_kv_heads=spec.num_kv_heads // parts,
        ffn_dim=spec.ffn_dim // tensor,
        experts=experts,
    )


@dataclass(frozen=True, slots=True)
class Cutting:
    """Where every array of an engine is cut over a mesh: trees of `PartitionSpec`s.

    Attributes:
        mesh: which one.
        whole_heads: heads do not divide over `tensor`, and none are cut.
    """

    mesh: MeshShape
    whole_heads: bool = False

    @classmethod
    def of(cls, spec: ModelSpec, mesh: MeshShape) -> "Cutting":
        """Of a model."""
        return cls(mesh, whole_heads=not heads_divide(spec, mesh))

    @property
    def rules(self) -> Rules:
        """Of the preset that uses every axis of the mesh."""
        preset = PRESETS[preset_of(self.mesh)]
        return with_whole_heads(preset) if self.whole_heads else preset

    @property
    def slices(self) -> PartitionSpec:
        """Of an array whose first axis has a part for each slice."""
        return partition(("slice",), self.rules)

    def weights(self, planned: Mapping[str, Any], wanted: Mapping[str, ParamSpec]) -> dict[str, Any]:
        """Of every weight, as planned, by path.

        Raises:
            ConfigError: one cannot be cut.
        """
        try:
            return {path: self._weight(path, planned[path], want) for path, want in wanted.items()}
        except ShardingError as error:
            raise ConfigError("mesh", self.mesh.text, f"cannot cut {error.field}: {error.problem}") from error

    def _weight(self, path: str, value: Any, want: ParamSpec) -> Any:
        if isinstance(value, LayerVariants):
            stacks = tuple(self._weight(path, stack, want) for stack in value.stacks)
            return LayerVariants(stacks=stacks, which=value.which, place=value.place)
        lead = ("layer",) if want.stacked else ()
        if not isinstance(value, QTensor):
            return cut(path, value.shape, (*lead, *want.axes), self.rules, self.mesh)
        names = {"N": want.axes[-2], "K": want.axes[-1]}
        lead = (*lead, *want.axes[:-2])
        self._check_inputs(path, value, want.axes[-1])
        specs: dict[str, PartitionSpec] = {}
        for child in SIDES[value.layout]:
            array = getattr(value, child)
            if array is not None:
                own = (None if side is None else names[side] for side in sides_of(value, child))
                specs[child] = cut(f"{path}.{child}", array.shape, (*lead, *own), self.rules, self.mesh)
        return replace(value, **specs)

    def _check_inputs(self, path: str, weight: QTensor, axis: str) -> None:
        """Inputs of a quantized weight lie in blocks."""
        (parts,) = parts_of(partition((axis,), self.rules), 1, self.mesh)
        most = parts_along_inputs(weight)
        if most % parts:
            fitting = ", ".join(map(str, divisors(most)))
            block = weight.shape[1] // most
            problem = f"its {weight.shape[1]} inputs lie in blocks of {block}: tensor may be {fitting}"
            raise ShardingError(path, parts, problem)

    def pages(self, pages: KVPages) -> KVPages:
        """Of the cache: each slice has its own pages, each device of `tensor` its own kv heads."""
        axes = ("layer", "slice", "kv_heads", None, None)
        cuts: Any = [None if part is None else partition(axes[: part.ndim], self.rules) for part in pages]
        return KVPages(*cuts)

    def sampler(self, state: SamplerState) -> SamplerState:
        """Of what the sampler remembers: each slice has its own slots. Masks of a bit a token are not cut further."""
        specs: Any = jax.tree.map(lambda leaf: partition(("slice", *(None,) * (leaf.ndim - 1)), self.rules), state)
        return replace(specs, output_counts=partition(("slice", "vocab_part"), self.rules))
