"""What the tensors of GGUF files are called, and where their rows go."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from atoma_jax.loading.checkpoint import Checkpoint, Rows
from atoma_jax.loading.weight_sources import (
    ALL,
    Part,
    WeightSource,
    check_sources,
    qkv_places,
    qkv_slices,
    until_misfit,
)
from atoma_jax.model_spec import ModelSpec
from atoma_jax.models.params import ParamSpec

_OUTSIDE_LAYERS = {"embed": "token_embd.weight", "head": "output.weight", "final_norm": "output_norm.weight"}
_IN_LAYERS = {  # behind "blk.0."
    "attn_out": "attn_output.weight",
    "down": "ffn_down.weight",
    "attn_norm": "attn_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "post_attn_norm": "post_attention_norm.weight",
    "post_ffn_norm": "post_ffw_norm.weight",
    "attn_sub_norm": "attn_sub_norm.weight",
    "ffn_sub_norm": "ffn_sub_norm.weight",
    "router": "ffn_gate_inp.weight",
    "shared_down": "ffn_down_shexp.weight",
    "shared_gate": "ffn_gate_inp_shexp.weight",
}
# Frequencies of rotary positions, which `spec.py` reads.
SPARE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_INTERLEAVED = ("llama",)  # architectures whose files interleave the two halves of each query and key head


def gguf_sources(checkpoint: Checkpoint, spec: ModelSpec, wanted: Mapping[str, ParamSpec]) -> dict[str, WeightSource]:
    """For every weight that the model wants, by path, where it is in the file. Raises what `check_sources` raises."""
    sources = {path: _source(path, checkpoint, spec, want) for path, want in wanted.items()}
    check_sources(checkpoint, spec, sources, SPARE)
    return sources


def _source(path: str, checkpoint: Checkpoint, spec: ModelSpec, want: ParamSpec) -> WeightSource:
    if path in _OUTSIDE_LAYERS:
        return WeightSource((), ((Part(_OUTSIDE_LAYERS[path], want.shape),),))
    name = path.removeprefix("layers.")
    L = spec.num_layers
    if name.startswith("experts_"):
        E = want.shape[0]
        blocks = (_expert_parts(name, f"blk.{i}.", checkpoint, want, e) for i in range(L) for e in range(E))
        return WeightSource((L, E), until_misfit(checkpoint, blocks))
    return WeightSource((L,), tuple(_parts(name, f"blk.{i}.", checkpoint, spec, want) for i in range(L)))


def _parts(name: str, block: str, checkpoint: Checkpoint, spec: ModelSpec, want: ParamSpec) -> tuple[Part, ...]:
    """The parts of one layer's weight."""
    behind = want.shape[1:]
    if name in ("qkv", "qkv_bias"):
        suffix = "weight" if name == "qkv" else "bias"
        places, slices, order = qkv_places(spec), qkv_slices(spec), _stored_rows(spec)
        fused = f"{block}attn_qkv.{suffix}"
        if fused in checkpoint.tensors and spec.architecture not in _INTERLEAVED:
            return tuple(Part(fused, want.shape, slices[part], places[part]) for part in "qkv")
        return tuple(
            Part(
                f"{block}attn_{part}.{suffix}",
                (slices[part].stop - slices[part].start, *behind),
                order[part],
                places[part],
            )
            for part in "qkv"
        )
    if name == "gate_up" and f"{block}ffn_gate.weight" not in checkpoint.tensors:
        return (Part(f"{block}ffn_up.weight", want.shape),)  # Phi-3 stores both as one
    if name in ("gate_up", "shared_gate_up"):
        end, half = "_shexp.weight" if name == "shared_gate_up" else ".weight", want.shape[0] // 2
        return (
            Part(f"{block}ffn_gate{end}", (half, *behind), ALL, slice(0, half)),
            Part(f"{block}ffn_up{end}", (half, *behind), ALL, slice(half, 2 * half)),
        )
    return (Part(f"{block}{_IN_LAYERS[name]}", want.shape),)


def _expert_parts(name: str, block: str, checkpoint: Checkpoint, want: ParamSpec, expert: int) -> tuple[Part, ...]:
    """The parts of one expert's weight: its rows of tensors that hold all experts of a layer."""
    E, N, K = want.shape
    fused = f"{block}ffn_gate_up_exps.weight"
    if name == "experts_down" or fused in checkpoint.tensors:
        tensor = f"{block}ffn_down_exps.weight" if name == "experts_down" else fused
        return (Part(tensor, want.shape, slice(expert * N, (expert + 1) * N)),)
    F = N // 2
    mine = slice(expert * F, (expert + 1) * F)
    return (
        Part(f"{block}ffn_gate_exps.weight", (E, F, K), mine, slice(0, F)),
        Part(f"{block}ffn_up_exps.weight", (E, F, K), mine, slice(F, N)),
    )


@lru_cache(maxsize=4)  # asked for by every layer
def _stored_rows(spec: ModelSpec) -> dict[str, Rows]:
    """Rows of the stored tensors in the order of heads whose halves rotate against each other."""
    if spec.architecture not in _INTERLEAVED:
        return {"q": ALL, "k": ALL, "v": ALL}
    H = spec.head_dim

    def undo(heads: int) -> Rows:
        return np.arange(heads * H).reshape(heads, H // 2, 2).swapaxes(1, 2).reshape(-1)

    return {"q": undo(spec.num_heads), "k": undo(spec.num_kv_heads), "v": ALL}
