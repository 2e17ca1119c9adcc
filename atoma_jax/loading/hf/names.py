"""What the tensors of models in HF layout are called, and where their rows go. Names are those of transformers."""

from collections.abc import Mapping

from atoma_jax.loading.checkpoint import Checkpoint
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

_OUTSIDE_LAYERS = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight", "final_norm": "model.norm.weight"}
_IN_LAYERS = {  # behind "model.layers.0."
    "attn_out": "self_attn.o_proj.weight",
    "down": "mlp.down_proj.weight",
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "attn_sub_norm": "self_attn.attn_sub_norm.weight",
    "ffn_sub_norm": "mlp.ffn_sub_norm.weight",
    "router": "mlp.gate.weight",
    "shared_down": "mlp.shared_expert.down_proj.weight",
    "shared_gate": "mlp.shared_expert_gate.weight",
}
_IN_GEMMA_LAYERS = {  # a norm behind the attention where others have that in front of the feed-forward net
    "post_attn_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "post_ffn_norm": "post_feedforward_layernorm.weight",
}
_EXPERTS = "mlp.experts"
_MIXTRAL = "block_sparse_moe"
_MIXTRAL_EXPERTS = {"gate": "w1", "up": "w3", "down": "w2"}


def hf_sources(checkpoint: Checkpoint, spec: ModelSpec, wanted: Mapping[str, ParamSpec]) -> dict[str, WeightSource]:
    """For every weight that the model wants, by path, where it is in the folder. Raises what `check_sources` raises."""
    sources = {path: _source(path, checkpoint, spec, want) for path, want in wanted.items()}
    used = {part.tensor for source in sources.values() for parts in source.blocks for part in parts}
    spare = {name for name in checkpoint.tensors if name not in used and _says_nothing(name, checkpoint, spec)}
    check_sources(checkpoint, spec, sources, spare)
    return sources


def _says_nothing(name: str, checkpoint: Checkpoint, spec: ModelSpec) -> bool:
    """Whether a tensor may be left out: rotary frequencies, which the config says, the head of tied embeddings, and
    the biases of zeros that quantizers add to every layer."""
    if name.endswith("rotary_emb.inv_freq") or (spec.tied_embeddings and name == _OUTSIDE_LAYERS["head"]):
        return True
    weight = checkpoint.tensors.get(f"{name.removesuffix('.bias')}.weight")
    if not name.endswith(".bias") or weight is None or weight.format is None:
        return False
    return not checkpoint.tensors[name].dequantize(ALL).any()


def _source(path: str, checkpoint: Checkpoint, spec: ModelSpec, want: ParamSpec) -> WeightSource:
    if path in _OUTSIDE_LAYERS:
        return WeightSource((), ((Part(_OUTSIDE_LAYERS[path], want.shape, plus=_plus(path, spec)),),))
    name = path.removeprefix("layers.")
    L = spec.num_layers
    if name.startswith("experts_"):
        E = want.shape[0]
        blocks = (_expert_parts(name, f"model.layers.{i}.", checkpoint, want, e) for i in range(L) for e in range(E))
        return WeightSource((L, E), until_misfit(checkpoint, blocks))
    return WeightSource((L,), tuple(_parts(name, f"model.layers.{i}.", checkpoint, spec, want) for i in range(L)))


def _plus(name: str, spec: ModelSpec) -> float:
    """Gemma's norms are stored as what they differ from 1."""
    return 1.0 if spec.family == "gemma" and name.endswith("norm") else 0.0


def _parts(name: str, layer: str, checkpoint: Checkpoint, spec: ModelSpec, want: ParamSpec) -> tuple[Part, ...]:
    """The parts of one layer's weight."""
    behind = want.shape[1:]
    if name in ("qkv", "qkv_bias"):
        suffix = "weight" if name == "qkv" else "bias"
        places, slices = qkv_places(spec), qkv_slices(spec)
        fused = f"{layer}self_attn.qkv_proj.{suffix}"
        if fused in checkpoint.tensors:
            return tuple(Part(fused, want.shape, slices[part], places[part]) for part in "qkv")
        return tuple(
            Part(
                f"{layer}self_attn.{part}_proj.{suffix}",
                (slices[part].stop - slices[part].start, *behind),
                ALL,
                places[part],
            )
            for part in "qkv"
        )
    if name in ("gate_up", "shared_gate_up"):
        net = f"{layer}mlp.shared_expert" if name == "shared_gate_up" else f"{layer}mlp"
        if f"{net}.gate_up_proj.weight" in checkpoint.tensors:
            return (Part(f"{net}.gate_up_proj.weight", want.shape),)
        half = want.shape[0] // 2
        return (
            Part(f"{net}.gate_proj.weight", (half, *behind), ALL, slice(0, half)),
            Part(f"{net}.up_proj.weight", (half, *behind), ALL, slice(half, 2 * half)),
        )
    if name == "router" and _is_mixtral(layer, checkpoint):
        return (Part(f"{layer}{_MIXTRAL}.gate.weight", want.shape),)
    shape = (1, *want.shape) if name == "shared_gate" else want.shape
    names = _IN_LAYERS | _IN_GEMMA_LAYERS if spec.family == "gemma" else _IN_LAYERS
    return (Part(f"{layer}{names[name]}", shape, plus=_plus(name, spec)),)


def _expert_parts(name: str, layer: str, checkpoint: Checkpoint, want: ParamSpec, expert: int) -> tuple[Part, ...]:
    """The parts of one expert's weight."""
    _, N, K = want.shape
    fused = f"{layer}{_EXPERTS}.{'down_proj' if name == 'experts_down' else 'gate_up_proj'}"
    if fused in checkpoint.tensors:  # all experts in one, as transformers 5 keeps them in memory
        return (Part(fused, want.shape, slice(expert * N, (expert + 1) * N)),)
    mixtral = _is_mixtral(layer, checkpoint)

    def tensor(part: str) -> str:
        if mixtral:
            return f"{layer}{_MIXTRAL}.experts.{expert}.{_MIXTRAL_EXPERTS[part]}.weight"
        return f"{layer}{_EXPERTS}.{expert}.{part}_proj.weight"

    if name == "experts_down":
        return (Part(tensor("down"), (N, K)),)
    F = N // 2
    return (
        Part(tensor("gate"), (F, K), ALL, slice(0, F)),
        Part(tensor("up"), (F, K), ALL, slice(F, N)),
    )


def _is_mixtral(layer: str, checkpoint: Checkpoint) -> bool:
    """Whether a layer's mixture has Mixtral's names."""
    return f"{layer}{_MIXTRAL}.gate.weight" in checkpoint.tensors
