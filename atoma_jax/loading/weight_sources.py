"""Which tensors of a checkpoint make up which weight of a model, row by row. Decodes nothing.

Owns the description and its check. What tensors are called is `gguf/names.py`'s and `hf/names.py`'s.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.checkpoint import Checkpoint, Rows
from atoma_jax.model_spec import ModelSpec

ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a weight that come from one tensor: `weight[to] = tensor[rows]`, leading axes of the tensor flattened."""

    tensor: str
    shape: tuple[int, ...]  # that the tensor must have
    rows: Rows = field(default_factory=lambda: ALL)  # of the tensor
    to: Rows = field(default_factory=lambda: ALL)  # of the weight
    plus: float = 0.0  # added to the values: norms that are stored as what they differ from 1


@dataclass(frozen=True, slots=True)
class WeightSource:
    """The parts that a weight is put together of, at each place of its leading axes: layers, experts, or none."""

    lead: tuple[int, ...]
    blocks: tuple[tuple[Part, ...], ...]  # as many as the product of `lead`


def layer_source(source: WeightSource, layer: int) -> WeightSource:
    """One layer of a weight, as if there were no others."""
    size = len(source.blocks) // source.lead[0]
    return WeightSource((1, *source.lead[1:]), source.blocks[layer * size : (layer + 1) * size])


def stacked_source(layers: Sequence[WeightSource]) -> WeightSource:
    """Some layers of a weight on each other."""
    blocks = tuple(parts for layer in layers for parts in layer.blocks)
    return WeightSource((len(layers), *layers[0].lead[1:]), blocks)


@lru_cache(maxsize=4)  # asked for by every layer
def qkv_places(spec: ModelSpec) -> dict[str, Rows]:
    """Rows of the fused weight, grouped by kv head: its G query heads, its key, its value (see models/llama.py)."""
    N, K, H = spec.num_heads, spec.num_kv_heads, spec.head_dim
    G = N // K
    place = np.arange((N + 2 * K) * H).reshape(K, G + 2, H)
    return {"q": place[:, :G].reshape(-1), "k": place[:, G].reshape(-1), "v": place[:, G + 1].reshape(-1)}


def qkv_slices(spec: ModelSpec) -> dict[str, slice]:
    """Rows of a tensor that holds all queries, then all keys, then all values."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}


def until_misfit(checkpoint: Checkpoint, blocks: Iterable[tuple[Part, ...]]) -> tuple[tuple[Part, ...], ...]:
    """The blocks up to the first that `check_sources` will refuse: a header may promise millions of experts."""
    taken: list[tuple[Part, ...]] = []
    for parts in blocks:
        taken.append(parts)
        tensors = checkpoint.tensors
        if any(part.tensor not in tensors or tensors[part.tensor].shape != part.shape for part in parts):
            break
    return tuple(taken)


def check_sources(
    checkpoint: Checkpoint, spec: ModelSpec, sources: Mapping[str, WeightSource], spare: Collection[str]
) -> None:
    """Every tensor that a weight needs is there in the right shape, and every tensor of the file has a place.

    Args:
        checkpoint: the open file or folder.
        spec: of the model.
        sources: of all its weights.
        spare: names of tensors that may be there and that no weight takes.

    Raises:
        WeightFileError: a tensor is missing or has another shape than the model's dimensions say.
        UnsupportedModelError: the file holds a tensor that no weight takes: a feature that is not implemented.
    """
    used: set[str] = set()
    for source in sources.values():
        for part in {part.tensor: part for parts in source.blocks for part in parts}.values():
            field = f"{checkpoint.path}: tensor {part.tensor!r}"
            if part.tensor not in checkpoint.tensors:
                raise WeightFileError(field, None, "is missing")
            shape = checkpoint.tensors[part.tensor].shape
            if shape != part.shape:
                raise WeightFileError(f"{field} shape", shape, f"must be {part.shape}")
            used.add(part.tensor)
    unused = [name for name in checkpoint.tensors if name not in used and name not in spare]
    if unused:
        raise UnsupportedModelError(
            f"{checkpoint.path}: tensor {unused[0]!r}", unused[0], f"has no place in a {spec.architecture} model here"
        )
