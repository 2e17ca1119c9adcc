"""A model's step over a mesh, lowered from shapes alone: for `bench/sharding.py`, the compile gate and tests. Nothing
is allocated, so the model may be larger than the machine, and the devices need not be there."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from atoma_jax.engine.batch import batch_size
from atoma_jax.engine.buckets import Program
from atoma_jax.engine.cutting import Cutting, device_spec, served_spec
from atoma_jax.engine.mesh_step import MeshStep
from atoma_jax.engine.sampler_state import SamplerShape
from atoma_jax.engine.step import EngineState, StepSizes, Weights, make_state, run_step
from atoma_jax.model_spec import KVDtype, ModelSpec
from atoma_jax.models.decoder import Decoder
from atoma_jax.models.params import specs_of
from atoma_jax.ops import Backend
from bench.real_models import abstract_values, graph_and_state, with_type
from sharding.apply import with_shardings
from sharding.mesh import MeshShape

PAGE_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshModel:
    """A model cut over a mesh.

    Attributes:
        served: its shape, as all devices hold it together.
        part: its shape, as one of them computes it.
        backend: of each device.
        devices: in their places.
        graph: of one device's part.
        weights: without values; each says where it lies.
    """

    served: ModelSpec
    part: ModelSpec
    backend: Backend
    devices: Mesh
    graph: Any
    weights: Weights

    @property
    def mesh(self) -> MeshShape:
        """Which one."""
        assert self.backend.mesh is not None
        return self.backend.mesh

    @property
    def cutting(self) -> Cutting:
        """Where its arrays are cut."""
        return Cutting(self.mesh, whole_heads=self.backend.whole_heads)


def mesh_model(spec: ModelSpec, type_name: str, backend: Backend, mesh: MeshShape, devices: Any) -> MeshModel:
    """A model with weights of a type of `real_models.FORMATS`, cut over the first of some devices.

    Raises:
        ConfigError: it cannot be cut so.
    """
    grid, cutting, vocab_size = mesh.build(devices), Cutting.of(spec, mesh), spec.vocab_size
    backend = replace(backend, mesh=mesh, whole_heads=cutting.whole_heads)
    served = served_spec(with_type(spec, type_name), mesh)
    planned = abstract_values(served, type_name, backend)
    cuts = cutting.weights(planned, specs_of(Decoder(served, backend)))
    placed = {path: with_shardings(planned[path], cut, grid) for path, cut in cuts.items()}
    part = device_spec(served, mesh, vocab_size)
    return MeshModel(
        served=served,
        part=part,
        backend=backend,
        devices=grid,
        graph=nnx.graphdef(Decoder(part, backend)),
        weights=graph_and_state(served, backend, placed)[1],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """Sizes of one program: pages and slots of each slice."""

    program: Program
    num_pages: int
    table_width: int
    kv_dtype: KVDtype = "bfloat16"

    @property
    def words(self) -> int:
        """int32 numbers of a slice's batch."""
        return batch_size(self.program, self.table_width)


def new_state(model: MeshModel, shape: StepShape) -> EngineState:
    """An empty state of all slices together."""
    slices, spec = model.mesh.num_slices, model.served
    slots = slices * shape.program.rows
    sampler = SamplerShape(
        slots=slots, vocab_size=spec.vocab_size, max_model_len=min(shape.table_width * PAGE_SIZE, spec.context_length)
    )
    pages = slices * shape.num_pages
    return make_state(spec, sampler, model.backend, num_pages=pages, page_size=PAGE_SIZE, kv_dtype=shape.kv_dtype)


def abstract_state(model: MeshModel, shape: StepShape) -> EngineState:
    """The same without values; every array says where it lies."""
    state = jax.eval_shape(partial(new_state, model, shape))
    return MeshStep(model.cutting, model.devices).abstract_state(state)


def lowered_step(model: MeshModel, shape: StepShape) -> jax.stages.Lowered:
    """The step as an engine lowers it: arguments are weights, state (donated) and words."""
    mesh = MeshStep(model.cutting, model.devices)
    state = abstract_state(model, shape)
    sizes = StepSizes(table_width=shape.table_width, page_size=PAGE_SIZE, max_logprobs=20, fixed_parts=False)
    step = partial(run_step, graph=model.graph, program=shape.program, sizes=sizes)
    words = mesh.abstract_words(shape.words)
    return jax.jit(mesh.step(step, model.weights, state), donate_argnums=1).lower(model.weights, state, words)


def device_part(tree: Any) -> Any:
    """Arrays that say where they lie, in the shapes that one device has."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype), tree)


def device_bytes(tree: Any) -> int:
    """Bytes of arrays that say where they lie, on one device."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(device_part(tree)))
