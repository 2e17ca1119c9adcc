"""A `ModelSpec` from the config.json of a model in HF layout. Reads no tensors.

Owns which architectures are known, what each takes for granted, and the checks of their settings. Defaults are those
of transformers' configuration classes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.hf.rope import RopeDefaults, read_rope, trained_positions
from atoma_jax.loading.json_file import Section
from atoma_jax.loading.spec_limits import MAX_DIM, MAX_EXPERTS, MAX_HEAD_DIM, MAX_LAYERS, MAX_POSITIONS
from atoma_jax.model_spec import Activation, ExpertSpec, Family, ModelSpec

_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu_squared"}
)
_LAYER_TYPES: Mapping[str, bool] = MappingProxyType({"sliding_attention": True, "full_attention": False})
_MAX_SOFTCAP = 1e6
_MAX_QUERY_SCALAR = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Which layers look back a limited number of tokens.

    Attributes:
        layers: all of them; those from `max_window_layers` on; every other one below it; all but every n-th.
        every: n.
        size: tokens, where the config does not say; None: no limit.
        switched: there is no limit unless the config says `use_sliding_window`.
    """

    layers: Literal["all", "from", "alternate below", "but every"]
    every: int = 0
    size: int | None = None
    switched: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What a config of one architecture leaves unsaid."""

    family: Family = "llama"
    activation: str = "silu"
    activation_key: str = "hidden_act"
    head_dim: int | None = None  # where the config does not say; None: a head's share of the width
    rope: RopeDefaults = field(default_factory=RopeDefaults)
    windows: Windows | None = None
    query_scalar: float | None = None  # attention is divided by its root; None: by that of head_dim
    attention_softcap: float | None = None
    final_softcap: float | None = None
    scaled_embeddings: bool = False  # by the root of the width
    tied: bool = False
    bias_key: str | None = "attention_bias"  # says whether q, k and v have biases; None: nothing does
    biases: bool = False
    qk_norm: bool = False
    sub_norms: bool = False
    shared_expert: bool = False
    normalized_experts: bool | None = None  # None: `norm_topk_prob` says it


def _gemma(
    *,
    every: int,
    rope: RopeDefaults,
    qk_norm: bool = False,
    attention_softcap: float | None = None,
    final_softcap: float | None = None,
) -> Architecture:
    return Architecture(
        family="gemma",
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        head_dim=256,
        rope=rope,
        windows=Windows(layers="but every", every=every, size=4096),
        query_scalar=256.0,
        attention_softcap=attention_softcap,
        final_softcap=final_softcap,
        scaled_embeddings=True,
        tied=True,
        qk_norm=qk_norm,
    )


_QWEN_WINDOWS = Windows(layers="from", size=4096, switched=True)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "LlamaForCausalLM": Architecture(),
        "MistralForCausalLM": Architecture(windows=Windows(layers="all", size=4096), bias_key=None),
        "Qwen2ForCausalLM": Architecture(windows=_QWEN_WINDOWS, bias_key=None, biases=True),
        "Qwen3ForCausalLM": Architecture(windows=_QWEN_WINDOWS, head_dim=128, qk_norm=True),
        "Phi3ForCausalLM": Architecture(
            windows=Windows(layers="all"), rope=RopeDefaults(partial=True, old_kinds=True), bias_key=None
        ),
        "Gemma2ForCausalLM": _gemma(every=2, rope=RopeDefaults(), attention_softcap=50.0, final_softcap=30.0),
        "Gemma3ForCausalLM": _gemma(every=6, rope=RopeDefaults(theta=1e6, local_theta=1e4), qk_norm=True),
        "MixtralForCausalLM": Architecture(
            family="mixture",
            rope=RopeDefaults(theta=1e6),
            windows=Windows(layers="all"),
            bias_key=None,
            normalized_experts=True,
        ),
        "Qwen2MoeForCausalLM": Architecture(
            family="mixture",
            windows=Windows(layers="alternate below", size=4096, switched=True),
            bias_key="qkv_bias",
            biases=True,
            shared_expert=True,
        ),
        "Qwen3MoeForCausalLM": Architecture(
            family="mixture", windows=Windows(layers="all", size=4096, switched=True), qk_norm=True
        ),
        "BitNetForCausalLM": Architecture(activation="relu2", rope=RopeDefaults(theta=5e5), sub_norms=True),
    }
)


def read_hf_spec(config: Section, *, int8_activations: bool = False, max_model_len: int | None = None) -> ModelSpec:
    """The shape of the model that a config describes.

    Args:
        config: config.json.
        int8_activations: the checkpoint's quantization rounds the inputs of its layers.
        max_model_len: tokens that will be served; LongRoPE has frequencies for short and for long contexts. None: the
            model's whole context.

    Raises:
        UnsupportedModelError: the architecture or one of its features is not implemented; the message lists what is.
        WeightFileError: a setting is missing, or has the wrong type or an impossible value.
    """
    name = _architecture(config)
    arch = ARCHITECTURES[name]
    _refuse_features(config, arch)
    layers = config.integer("num_hidden_layers", minimum=1, maximum=MAX_LAYERS)
    dim = config.integer("hidden_size", minimum=1, maximum=MAX_DIM)
    heads = config.integer("num_attention_heads", minimum=1, maximum=MAX_DIM)
    head_dim = _head_dim(config, arch, dim, heads)
    kv_heads = config.integer("num_key_value_heads", heads, minimum=1, maximum=heads)
    if heads % kv_heads:
        raise WeightFileError(config.field("num_key_value_heads"), kv_heads, f"must divide the {heads} heads")
    experts = _experts(config, arch) if arch.family == "mixture" else None
    context = trained_positions(config)
    scalar = float(head_dim)
    if arch.query_scalar is not None:
        scalar = config.number("query_pre_attn_scalar", arch.query_scalar, minimum=1.0, maximum=_MAX_QUERY_SCALAR)
    ffn_dim = config.integer("intermediate_size", minimum=1, maximum=MAX_DIM) if experts is None else experts.ffn_dim
    return ModelSpec(
        architecture=name,
        family=arch.family,
        vocab_size=config.integer("vocab_size", minimum=1),
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        context_length=context,
        norm_eps=config.number("rms_norm_eps", minimum=0.0, maximum=1.0),
        rope=read_rope(config, arch.rope, head_dim=head_dim, context=max_model_len or context),
        windows=_windows(config, arch.windows, layers),
        attention_scale=1.0 / math.sqrt(scalar),
        attention_softcap=_softcap(config, "attn_logit_softcapping", arch.family, arch.attention_softcap),
        final_softcap=_softcap(config, "final_logit_softcapping", arch.family, arch.final_softcap),
        embedding_scale=math.sqrt(dim) if arch.scaled_embeddings else 1.0,
        activation=_activation(config, arch),
        tied_embeddings=config.boolean("tie_word_embeddings", arch.tied),
        qkv_bias=arch.biases if arch.bias_key is None else config.boolean(arch.bias_key, arch.biases),
        qk_norm=arch.qk_norm,
        sub_norms=arch.sub_norms,
        int8_activations=int8_activations,
        experts=experts,
    )


def _architecture(config: Section) -> str:
    names = config.texts("architectures")
    known = f"must be one of {', '.join(sorted(ARCHITECTURES))}"
    if len(names) != 1:
        raise WeightFileError(config.field("architectures"), list(names), f"must name one architecture, and {known}")
    if names[0] not in ARCHITECTURES:
        raise UnsupportedModelError(config.field("architectures"), names[0], known)
    return names[0]


def _refuse_features(config: Section, arch: Architecture) -> None:
    """What changes the arithmetic of other models, and would be passed over in silence here."""
    config.refuse("mlp_bias", "must be false: biases of feed-forward nets are not implemented")
    config.refuse("use_bidirectional_attention", "must be false: only causal attention is implemented")
    config.refuse("use_mrope", "must be false: positions of several dimensions are not implemented")
    if arch.bias_key != "attention_bias":
        config.refuse("attention_bias", "must be false: this architecture has none")
    alike = arch.windows is None or arch.windows.layers == "all"
    if alike and len(set(_layer_types(config))) > 1:
        problem = "must be the same in all layers of this architecture"
        raise UnsupportedModelError(config.field("layer_types"), config.values["layer_types"], problem)


def _head_dim(config: Section, arch: Architecture, dim: int, heads: int) -> int:
    head_dim = config.integer("head_dim", arch.head_dim or dim // heads)
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:  # may be a quotient
        limit = f"must be even and in [2, {MAX_HEAD_DIM}]"
        raise WeightFileError(config.field("head_dim"), head_dim, limit)
    if heads * head_dim > MAX_DIM:
        limit = f"must be at most {MAX_DIM // head_dim} for heads of {head_dim}"
        raise WeightFileError(config.field("num_attention_heads"), heads, limit)
    return head_dim


def _experts(config: Section, arch: Architecture) -> ExpertSpec:
    config.refuse("mlp_only_layers", "must be empty: layers without experts among others are not implemented")
    step = config.integer("decoder_sparse_step", 1)
    if step != 1:
        problem = "must be 1: layers without experts among others are not implemented"
        raise UnsupportedModelError(config.field("decoder_sparse_step"), step, problem)
    count_key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    count = config.integer(count_key, minimum=1, maximum=MAX_EXPERTS)
    normalized = arch.normalized_experts
    width = "intermediate_size" if normalized else "moe_intermediate_size"  # Mixtral's or Qwen's
    shared = 0
    if arch.shared_expert:
        shared = config.integer("shared_expert_intermediate_size", minimum=1, maximum=MAX_DIM)
    return ExpertSpec(
        count=count,
        used=config.integer("num_experts_per_tok", minimum=1, maximum=count),
        ffn_dim=config.integer(width, minimum=1, maximum=MAX_DIM),
        normalized=config.boolean("norm_topk_prob", False) if normalized is None else normalized,
        shared_ffn_dim=shared,
    )


def _windows(config: Section, kind: Windows | None, layers: int) -> tuple[int | None, ...]:
    """Tokens that each layer looks back; empty where no layer has a limit."""
    if kind is None or (kind.switched and not config.boolean("use_sliding_window", False)):
        return ()
    size = kind.size
    if "sliding_window" in config.values:  # a null says that there is no limit
        size = (
            config.integer("sliding_window", minimum=1, maximum=MAX_POSITIONS) if "sliding_window" in config else None
        )
    if size is None:
        return ()
    windowed = _layer_types(config) if kind.layers != "all" else ()
    if windowed and len(windowed) != layers:
        field = config.field("layer_types")
        raise WeightFileError(field, f"list of {len(windowed)}", f"must be a list of {layers}, as there are layers")
    if not windowed:
        windowed = _pattern(config, kind, layers)
    return tuple(size if is_windowed else None for is_windowed in windowed)


def _layer_types(config: Section) -> tuple[bool, ...]:
    """Whether each layer has a window, as far as the config lists it."""
    kinds = config.texts("layer_types")
    for kind in kinds:
        if kind not in _LAYER_TYPES:
            problem = f"is not implemented; those that are: {', '.join(_LAYER_TYPES)}"
            raise UnsupportedModelError(config.field("layer_types"), kind, problem)
    return tuple(_LAYER_TYPES[kind] for kind in kinds)


def _pattern(config: Section, kind: Windows, layers: int) -> tuple[bool, ...]:
    """Whether each layer has a window, where the config does not list it."""
    if kind.layers == "all":
        return (True,) * layers
    if kind.layers == "but every":
        key = "sliding_window_pattern" if "sliding_window_pattern" in config else "_sliding_window_pattern"
        every = config.integer(key, kind.every, minimum=1, maximum=MAX_LAYERS) if kind.every == 6 else kind.every
        return tuple((layer + 1) % every != 0 for layer in range(layers))
    border = config.integer("max_window_layers", 28)
    if kind.layers == "from":
        return tuple(layer >= border for layer in range(layers))
    return tuple(layer < border and layer % 2 == 0 for layer in range(layers))


def _activation(config: Section, arch: Architecture) -> Activation:
    name = config.text(arch.activation_key, arch.activation)
    if name not in _ACTIVATIONS:
        problem = f"is not implemented; those that are: {', '.join(_ACTIVATIONS)}"
        raise UnsupportedModelError(config.field(arch.activation_key), name, problem)
    return _ACTIVATIONS[name]


def _softcap(config: Section, key: str, family: Family, default: float | None) -> float | None:
    """The limit of some logits' size; a null says that there is none."""
    if family != "gemma":
        config.refuse(key, "must be left out: this architecture has none")
        return None
    if key not in config.values:
        return default
    return config.number(key, minimum=1e-3, maximum=_MAX_SOFTCAP) if key in config else None
