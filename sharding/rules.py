"""Which axes of a mesh each logical axis of an array is cut over: one table, and presets of it.

A model names the dimensions of its weights by what they mean. `heads`, `ffn` and `vocab_part` are what `tensor` splits.
Out-features of a matrix (`…_out`, `vocab`) are cut over `fsdp` as well, behind `tensor`, so that the parts that are
gathered along `fsdp` make up one part of `tensor` without a gap. Rows of a quantized weight can be cut anywhere, where
its inputs lie in blocks: so `fsdp` never cuts inputs.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from jax.sharding import PartitionSpec

from sharding.errors import ShardingError
from sharding.mesh import SLICES, MeshShape

Rules: TypeAlias = Mapping[str, tuple[str, ...]]

FSDP_TENSOR: Rules = MappingProxyType(
    {
        "layer": (),
        "embed": (),  # inputs of width D, and vectors along it
        "head_dim": (),
        "vocab": ("tensor", "fsdp"),  # rows of the tables of embeddings and of the head
        "vocab_part": ("tensor",),  # logits, and what the sampler counts for each token
        "heads_out": ("tensor", "fsdp"),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "ffn_out": ("tensor", "fsdp"),
        "ffn": ("tensor",),
        "embed_out": ("fsdp",),
        "expert": ("expert",),
        "router": (),  # every device routes every token of its slice
        "slice": SLICES,  # tokens, rows, slots and pages: each slice has its own
    }
)


def _only(*axes: str) -> Rules:
    """The table without the axes of the mesh that are not named."""
    kept = {name: tuple(axis for axis in over if axis in axes) for name, over in FSDP_TENSOR.items()}
    return MappingProxyType(kept)


TENSOR: Rules = _only("data", "tensor", "expert")
FSDP: Rules = _only("data", "fsdp")
PRESETS: Mapping[str, Rules] = MappingProxyType({"tensor": TENSOR, "fsdp": FSDP, "fsdp_tensor": FSDP_TENSOR})


def with_whole_heads(rules: Rules) -> Rules:
    """The same where each device of `tensor` has all heads, as they do not divide."""
    heads = ("heads_out", "heads", "kv_heads")
    return MappingProxyType(
        {
            name: tuple(axis for axis in over if axis != "tensor") if name in heads else over
            for name, over in rules.items()
        }
    )


def preset_of(shape: MeshShape) -> str:
    """The name of the smallest preset that uses every axis of a mesh."""
    if shape.fsdp == 1:
        return "tensor"
    return "fsdp" if shape.tensor == shape.expert == 1 else "fsdp_tensor"


def partition(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """Where an array with these logical axes is cut; None for an axis that never is.

    Raises:
        ShardingError: an axis is in no rule, or two of them claim one axis of the mesh.
    """
    claimed: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = []
    for name in axes:
        if name is not None and name not in rules:
            raise ShardingError("axis", name, f"is in no rule; there are {', '.join(rules)}")
        over = () if name is None else rules[name]
        for axis in over:
            if axis in claimed:
                problem = f"both {claimed[axis]} and {name} of one array lie on the mesh axis {axis}: change a rule"
                raise ShardingError("axes", tuple(axes), problem)
            claimed[axis] = str(name)
        entries.append(over or None)
    return PartitionSpec(*entries)
