"""A step on the devices of a mesh: every device runs `step.run_step` on its part of weights, state and batch.

Owns where state, batches and results lie, and how a function of one device becomes one of all. Each slice (`data` ×
`fsdp`) has slots, pages and a batch of its own, all numbered from 0: on a device nothing but the collectives that its
mesh calls for differs from the step of one device.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from atoma_jax.engine.cutting import Cutting
from atoma_jax.engine.sampler_state import SamplerState, SlotRow, write_allowed, write_slot
from atoma_jax.engine.step import EngineState, StepOutput, Weights
from atoma_jax.quant.cuts import parts_of_tree
from sharding.apply import with_shardings
from sharding.collectives import part_index
from sharding.mesh import SLICES, MeshShape

Step = Callable[[Weights, EngineState, Any], tuple[EngineState, StepOutput]]


class MeshStep:
    """Functions of one device made into functions of a mesh."""

    def __init__(self, shape: MeshShape, devices: Mesh):
        self.shape, self._devices, self._cutting = shape, devices, Cutting(shape)

    def abstract_state(self, state: EngineState) -> EngineState:
        """A state with the shapes of all slices together, which says where it lies."""
        return with_shardings(state, self._state_cuts(state), self._devices)

    def new_state(self, make: Callable[[], EngineState]) -> EngineState:
        """What `make` makes, each part on its device from the start."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state(jax.eval_shape(make)))
        return jax.jit(make, out_shardings=shardings)()

    def abstract_words(self, count: int) -> jax.ShapeDtypeStruct:
        """The batches of all slices, `count` words each, behind each other."""
        sharding = NamedSharding(self._devices, self._cutting.slices)
        return jax.ShapeDtypeStruct((self.shape.num_slices * count,), jnp.int32, sharding=sharding)

    def step(self, run: Step, weights: Weights, state: EngineState) -> Step:
        """`run` on every device; results of all slices behind each other.

        Args:
            run: takes weights, state and words of one device.
            weights: abstract, with shardings.
            state: likewise.
        """

        def part(weights: Weights, state: EngineState, words: Array) -> tuple[EngineState, StepOutput]:
            return run(parts_of_tree(weights), state, words)

        slices: Any = self._cutting.slices
        tokens_ok: Any = PartitionSpec(None, *slices)
        output = StepOutput(tokens_ok=tokens_ok, logprob=slices, rank=slices, top_ids=slices, top_logprobs=slices)
        cuts = _cuts_of(state)
        return self._on_devices(part, (_cuts_of(weights), cuts, slices), (cuts, output))

    def slot_writer(self, state: SamplerState, row: SlotRow) -> Callable[..., SamplerState]:
        """`write_slot` with the slice as a further argument, before the slot."""
        cuts, whole = self._cutting.sampler(state), PartitionSpec()
        row_cuts = replace(jax.tree.map(lambda _: whole, row), output_counts=PartitionSpec(*cuts.output_counts[1:]))

        def write(state: SamplerState, home: Int32[Array, ""], slot: Int32[Array, ""], row: SlotRow) -> SamplerState:
            mine = part_index(self.shape, *SLICES) == home
            return write_slot(state, jnp.where(mine, slot, state.last_token.shape[0]), row)  # past the end: dropped

        return self._on_devices(write, (cuts, whole, whole, row_cuts), cuts)

    def allowed_writer(self, state: SamplerState) -> Callable[..., SamplerState]:
        """`write_allowed` with the slots and bits of all slices behind each other."""
        cuts, slices = self._cutting.sampler(state), self._cutting.slices
        return self._on_devices(write_allowed, (cuts, slices, slices), cuts)

    def abstract_allowed(self, rows: int, words: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """What `allowed_writer` takes beside the state, for `rows` slots of each slice."""
        sharding = NamedSharding(self._devices, self._cutting.slices)
        count = self.shape.num_slices * rows
        return (
            jax.ShapeDtypeStruct((count,), jnp.int32, sharding=sharding),
            jax.ShapeDtypeStruct((count, words), jnp.int32, sharding=sharding),
        )

    def _on_devices(self, function: Callable[..., Any], cuts: Any, out_cuts: Any) -> Callable[..., Any]:
        # Kernels do not say over which axes their results vary, so that JAX cannot check it.
        return jax.shard_map(function, mesh=self._devices, in_specs=cuts, out_specs=out_cuts, check_vma=False)

    def _state_cuts(self, state: EngineState) -> EngineState:
        return EngineState(pages=self._cutting.pages(state.pages), sampler=self._cutting.sampler(state.sampler))


def _cuts_of(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding.spec, abstract)
