"""Which tensors of a GGUF file make up which weight of a model, row by row. Decodes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.gguf import GGUFFile
from atoma_jax.model_spec import ModelSpec

Rows: TypeAlias = np.ndarray[Any, np.dtype[np.int64]] | slice  # indices, or neighbours without a step


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a weight that come from one tensor: `weight[to] = tensor[rows]`, all rows of the tensor in some order."""

    tensor: str
    rows: Rows  # of the tensor
    to: Rows  # of the weight


@dataclass(frozen=True, slots=True)
class WeightSource:
    """The parts that a weight is put together of, for each layer; once for a weight outside of layers."""

    layers: tuple[tuple[Part, ...], ...]
    stacked: bool  # has an axis of layers


_ALL = slice(None)
_OUTSIDE_LAYERS = {
    "embed": "token_embd.weight",
    "head": "output.weight",
    "final_norm": "output_norm.weight",
    "rope_divisors": "rope_freqs.weight",
}
_IN_LAYERS = {  # behind "blk.0."
    "attn_out": "attn_output.weight",
    "down": "ffn_down.weight",
    "attn_norm": "attn_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "post_attn_norm": "post_attention_norm.weight",
    "post_ffn_norm": "post_ffw_norm.weight",
}


def weight_sources(file: GGUFFile, spec: ModelSpec, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, WeightSource]:
    """For every weight that the model wants (path → logical shape), where it is in the file.

    Raises:
        WeightFileError: a tensor is missing or has another shape than the model's dimensions say.
        UnsupportedModelError: the file holds a tensor that no weight takes: a feature that is not implemented.
    """
    sources = {path: _source(path, spec) for path in wanted}
    used: set[str] = set()
    for path, source in sources.items():
        for parts in source.layers:
            _check_shapes(file, parts, wanted[path])
            used.update(part.tensor for part in parts)
    unused = [name for name in file.tensors if name not in used]
    if unused:
        raise UnsupportedModelError(
            f"{file.path}: tensor {unused[0]!r}", unused[0], f"has no place in a {spec.architecture} model here"
        )
    return sources


def _source(path: str, spec: ModelSpec) -> WeightSource:
    if path in _OUTSIDE_LAYERS:
        return WeightSource(((Part(_OUTSIDE_LAYERS[path], _ALL, _ALL),),), stacked=False)
    name = path.removeprefix("layers.")
    if name in ("qkv", "qkv_bias"):
        suffix = "weight" if name == "qkv" else "bias"
        rows, places = _stored_rows(spec), _qkv_places(spec)
        parts = tuple(Part(f"attn_{part}.{suffix}", rows[part], places[part]) for part in ("q", "k", "v"))
    elif name == "gate_up":
        F = spec.ffn_dim
        parts = (Part("ffn_gate.weight", _ALL, slice(0, F)), Part("ffn_up.weight", _ALL, slice(F, 2 * F)))
    else:
        parts = (Part(_IN_LAYERS[name], _ALL, _ALL),)
    layers = (tuple(replace(part, tensor=f"blk.{i}.{part.tensor}") for part in parts) for i in range(spec.num_layers))
    return WeightSource(tuple(layers), stacked=True)


def _qkv_places(spec: ModelSpec) -> dict[str, Rows]:
    """Rows of the fused weight, grouped by kv head: its G query heads, its key, its value (see models/llama.py)."""
    N, K, H = spec.num_heads, spec.num_kv_heads, spec.head_dim
    G = N // K
    place = np.arange((N + 2 * K) * H).reshape(K, G + 2, H)
    return {"q": place[:, :G].reshape(-1), "k": place[:, G].reshape(-1), "v": place[:, G + 1].reshape(-1)}


def _stored_rows(spec: ModelSpec) -> dict[str, Rows]:
    """Rows of the stored tensors in the order of heads whose halves rotate against each other.

    Files of the llama architecture interleave the two halves of each query and key head; others store them as they are.
    """
    if spec.architecture != "llama":
        return {"q": _ALL, "k": _ALL, "v": _ALL}
    H = spec.head_dim

    def undo(heads: int) -> Rows:
        return np.arange(heads * H).reshape(heads, H // 2, 2).swapaxes(1, 2).reshape(-1)

    return {"q": undo(spec.num_heads), "k": undo(spec.num_kv_heads), "v": _ALL}


def _check_shapes(file: GGUFFile, parts: tuple[Part, ...], wanted: tuple[int, ...]) -> None:
    """The parts of one layer's weight exist and fill it: shape `wanted`, `[N, K]` or `[n]`."""
    for part in parts:
        field = f"{file.path}: tensor {part.tensor!r}"
        if part.tensor not in file.tensors:
            raise WeightFileError(field, None, "is missing")
        rows = len(range(*part.to.indices(wanted[0]))) if isinstance(part.to, slice) else len(part.to)
        shape = (rows, *wanted[1:])
        if file.tensors[part.tensor].shape != shape:
            raise WeightFileError(f"{field} shape", file.tensors[part.tensor].shape, f"must be {shape}")
