"""The order of rows of weights that devices share: each device's part of a fused weight is that weight in small.

Fused weights hold several projections on each other. Cut as they are, one device would get the gates and another the
ups. So parts are interleaved while loading: the gates and ups of the first device, of the second, and so on. Keys and
values are repeated where devices outnumber kv heads; rows behind a vocabulary fill it up. Decodes nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from atoma_jax.loading.weight_sources import Part, WeightSource, qkv_places
from atoma_jax.model_spec import ModelSpec
from atoma_jax.models.params import ParamSpec

_GATED = ("gate_up", "shared_gate_up", "experts_gate_up")
_FUSED = ("qkv", "qkv_bias")
_TABLES = ("embed", "head")


def in_parts(
    sources: Mapping[str, WeightSource],
    wanted: Mapping[str, ParamSpec],
    spec: ModelSpec,
    served: ModelSpec,
    parts: int,
) -> dict[str, WeightSource]:
    """Sources whose rows go where `parts` devices want them.

    Args:
        sources: of the model as the file has it, checked.
        wanted: its weights.
        spec: its shape.
        served: the same as all devices hold it together.
        parts: that heads and feed-forward nets are cut into.
    """

    def reordered(path: str, source: WeightSource) -> WeightSource:
        name = path.rpartition(".")[2]
        if name in _GATED and parts > 1:
            places = _gated_places(wanted[path].shape[-2], parts)
            return _moved(source, lambda part: replace(part, to=places[part.to]))
        if name in _TABLES and served.vocab_size != spec.vocab_size:
            return _moved(source, lambda part: replace(part, to=slice(0, spec.vocab_size)))
        if name in _FUSED and served.num_kv_heads != spec.num_kv_heads:
            blocks = tuple(_with_copies(block, spec, served) for block in source.blocks)
            return replace(source, blocks=blocks)
        return source

    return {path: reordered(path, source) for path, source in sources.items()}


def _moved(source: WeightSource, move: Callable[[Part], Part]) -> WeightSource:
    return replace(source, blocks=tuple(tuple(map(move, block)) for block in source.blocks))


def _gated_places(rows: int, parts: int) -> np.ndarray:
    """Where each row of all gates, then all ups, goes."""
    return np.arange(rows).reshape(parts, 2, rows // (2 * parts)).swapaxes(0, 1).reshape(-1)


def _with_copies(block: tuple[Part, ...], spec: ModelSpec, served: ModelSpec) -> tuple[Part, ...]:
    """Queries, keys and values, each kv head as often as devices have it."""
    places, copies, H = qkv_places(served), served.num_kv_heads // spec.num_kv_heads, spec.head_dim
    q, k, v = block

    def repeated(part: Part) -> np.ndarray:
        rows = np.arange(part.shape[0])[part.rows] if isinstance(part.rows, slice) else part.rows
        return np.repeat(rows.reshape(spec.num_kv_heads, H), copies, axis=0).reshape(-1)

    return (
        replace(q, to=places["q"]),
        replace(k, rows=repeated(k), to=places["k"]),
        replace(v, rows=repeated(v), to=places["v"]),
    )
