"""What a model takes and what fits beside it, from headers alone: reads no weights and allocates nothing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from atoma_jax.config import EngineConfig
from atoma_jax.engine.memory import reserved_workspace
from atoma_jax.engine.mesh_config import planned_mesh
from atoma_jax.engine.model_setup import ModelSetup, served_length, set_up_model
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.model_files import open_model
from atoma_jax.ops import Platform


@dataclass(frozen=True, slots=True, kw_only=True)
class TypePlan:
    """All tensors of one type."""

    tensors: int
    parameters: int
    file_bytes: int

    @property
    def bits(self) -> float:
        """Bits of a parameter in the file."""
        return 8 * self.file_bytes / self.parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """Sizes of one model on one device, or on each device of a mesh; bytes unless it says otherwise.

    Attributes:
        architecture: as the file calls it.
        types: the file's tensors by type, the largest share first.
        mesh: devices along each axis, as `--mesh` takes it; None: one device.
        slices: of devices that have pages and sequences of their own; the others are counted for each of them.
        weights: on a device, by the weight's path in the model.
        platform: of the device.
        layout: of the quantized ones.
        context_length: tokens that the model was trained for.
        kv_dtype: of the cache.
        kv_bytes_per_token: in all layers.
        page_tokens: tokens of a page, the unit that the cache is given out in.
        workspace: kept for the temporaries of a step.
        memory: that the engine may use of a device; None where none was named.
        max_model_len: tokens of a sequence that `max_sequences` counts with.
    """

    architecture: str
    types: Mapping[str, TypePlan]
    mesh: str | None
    slices: int
    weights: Mapping[str, int]
    platform: Platform
    layout: str
    context_length: int
    kv_dtype: str
    kv_bytes_per_token: int
    page_tokens: int
    workspace: int
    memory: int | None
    max_model_len: int

    @property
    def parameters(self) -> int:
        """Numbers in the file."""
        return sum(kind.parameters for kind in self.types.values())

    @property
    def file_bytes(self) -> int:
        """Of all tensors."""
        return sum(kind.file_bytes for kind in self.types.values())

    @property
    def weight_bytes(self) -> int:
        """Of all weights on the device."""
        return sum(self.weights.values())

    @property
    def kv_bytes(self) -> int | None:
        """What `memory` leaves for the cache; negative where the weights alone do not fit."""
        return None if self.memory is None else self.memory - self.weight_bytes - self.workspace

    @property
    def longest_context(self) -> int | None:
        """Tokens of one sequence that has the cache to itself, at most what the model was trained for."""
        return None if self.kv_bytes is None else min(self.context_length, self._pages * self.page_tokens)

    @property
    def max_sequences(self) -> int | None:
        """Sequences of `max_model_len` tokens that fit at once, in all slices."""
        if self.kv_bytes is None:
            return None
        return self.slices * (self._pages // math.ceil(self.max_model_len / self.page_tokens))

    @property
    def _pages(self) -> int:
        """Pages that sequences can have: the first one is scratch."""
        assert self.kv_bytes is not None
        return max(0, self.kv_bytes // (self.kv_bytes_per_token * self.page_tokens) - 1)


def plan_model(
    config: EngineConfig, *, memory: int | None = None, platform: Platform | None = None, progress: bool = True
) -> ModelPlan:
    """Sizes of the model that `config` names, on one device or on each of its mesh, which need not be there.

    Args:
        config: checked settings; those of model and cache count.
        memory: bytes of a device that weights, cache and temporaries may take together.
        platform: of the device; None: of this process's.
        progress: show bars on standard error for what is fetched.

    Raises:
        UserError: the model or a setting cannot be used; see the subclasses.
        DownloadError: the model could not be fetched.
    """
    found = resolve(config.model.model, revision=config.model.revision, progress=progress)
    with open_model(found, max_model_len=config.model.max_model_len) as files:
        mesh = planned_mesh(config.mesh.mesh)
        setup = set_up_model(config.model, files, platform, mesh)
        spec, is_cpu = setup.spec, setup.backend.platform == "cpu"
        length = served_length(config.model, setup)
        kv_dtype = setup.kv_dtype(config.cache)
        return ModelPlan(
            architecture=spec.architecture,
            types=_types(setup),
            mesh=None if mesh is None else mesh.text,
            slices=1 if mesh is None else mesh.num_slices,
            weights={path: setup.bytes_of(path) for path in setup.planned},
            platform=setup.backend.platform,
            layout=setup.backend.weight_layout,
            context_length=spec.context_length,
            kv_dtype=kv_dtype,
            kv_bytes_per_token=setup.device_spec.kv_bytes_per_token(kv_dtype),
            page_tokens=config.cache.block_size,
            workspace=reserved_workspace(memory or 2**60, is_cpu=is_cpu),
            memory=memory,
            max_model_len=length,
        )


def _types(setup: ModelSetup) -> dict[str, TypePlan]:
    tensors = setup.checkpoint.tensors.values()
    found: dict[str, TypePlan] = {}
    for name in {tensor.type_name for tensor in tensors}:
        same = [tensor for tensor in tensors if tensor.type_name == name]
        found[name] = TypePlan(
            tensors=len(same),
            parameters=sum(math.prod(tensor.shape) for tensor in same),
            file_bytes=sum(tensor.nbytes for tensor in same),
        )
    return dict(sorted(found.items(), key=lambda entry: -entry[1].file_bytes))
