"""A `ModelSpec` from a GGUF file's metadata and tensor names. Of the tensors it reads only rotary frequencies."""

import math

import numpy as np

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading import rope
from atoma_jax.loading.gguf.file import GGUFFile
from atoma_jax.loading.spec_limits import MAX_DIM, MAX_EXPERTS, MAX_HEAD_DIM, MAX_LAYERS
from atoma_jax.model_spec import Activation, ExpertSpec, Family, ModelSpec, RopeSpec

FAMILIES: dict[str, Family] = {
    "llama": "llama",  # a mixture where it has experts
    "qwen2": "llama",
    "qwen3": "llama",
    "phi3": "llama",
    "bitnet": "llama",
    "bitnet-b1.58": "llama",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "qwen2moe": "mixture",
    "qwen3moe": "mixture",
}
_ACTIVATIONS: dict[str, Activation] = {
    "gemma2": "gelu_tanh",
    "gemma3": "gelu_tanh",
    "bitnet-b1.58": "relu_squared",  # as Microsoft's models; llama.cpp's own `bitnet` graph has silu
}

_ACTIVATION_NAMES: dict[str, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu_squared",
    "relu_squared": "relu_squared",
}

GEMMA_LOCAL_THETA = 10_000.0  # not in the metadata of most files
GEMMA_WINDOWS = {"gemma2": 4096, "gemma3": 512}  # likewise
GEMMA_PATTERNS = {"gemma2": 2, "gemma3": 6}  # likewise: every second or sixth layer sees everything
# The sizes whose queries are scaled by the width of a head's share, not by the head dim: 27 billion parameters each.
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}

WHOLE_HEADS_ROTATE = ("llama", "gemma2", "gemma3")  # with fewer dimensions, the rows of these files mean something else


def read_spec(file: GGUFFile, *, max_model_len: int | None = None) -> ModelSpec:
    """The shape of the model in `file`.

    Args:
        file: open.
        max_model_len: tokens that will be served; LongRoPE has frequencies for short and for long contexts. None: the
            model's whole context.

    Raises:
        UnsupportedModelError: the architecture or one of its features is not implemented; the message lists what is.
        WeightFileError: a key is missing or contradicts the tensors.
    """
    meta = file.metadata
    arch = meta.get_str("general.architecture")
    if arch not in FAMILIES:
        raise UnsupportedModelError(
            meta.field("general.architecture"), arch, f"must be one of {', '.join(sorted(FAMILIES))}"
        )
    _refuse_features(file, arch)
    layers = meta.get_int(f"{arch}.block_count", minimum=1, maximum=MAX_LAYERS)
    dim = meta.get_int(f"{arch}.embedding_length", minimum=1, maximum=MAX_DIM)
    heads = _one_for_all(file, f"{arch}.attention.head_count", layers)
    kv_heads = _one_for_all(file, f"{arch}.attention.head_count_kv", layers, heads)
    if heads % kv_heads:
        key = f"{arch}.attention.head_count_kv"
        raise WeightFileError(meta.field(key), kv_heads, f"must divide the {heads} heads")
    head_dim = meta.get_int(f"{arch}.attention.key_length", dim // heads, minimum=2, maximum=MAX_HEAD_DIM)
    _check_head_dim(file, arch, heads, head_dim)
    experts = _experts(file, arch, layers)
    context = meta.get_int(f"{arch}.context_length", minimum=1)
    return ModelSpec(
        architecture=arch,
        family=FAMILIES[arch] if experts is None else "mixture",
        vocab_size=_rows_of(file, "token_embd.weight"),
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_dim=_one_for_all(file, f"{arch}.feed_forward_length", layers) if experts is None else experts.ffn_dim,
        context_length=context,
        norm_eps=meta.get_float(f"{arch}.attention.layer_norm_rms_epsilon", minimum=0.0),
        rope=_rope(file, arch, head_dim, max_model_len or context),
        windows=_windows(file, arch, layers),
        attention_scale=_attention_scale(arch, layers, dim, heads, head_dim),
        attention_softcap=meta.get_float(f"{arch}.attn_logit_softcapping", None, above=0.0),
        final_softcap=meta.get_float(f"{arch}.final_logit_softcapping", None, above=0.0),
        embedding_scale=math.sqrt(dim) if FAMILIES[arch] == "gemma" else 1.0,
        activation=_activation(file, arch),
        tied_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors or "blk.0.attn_qkv.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sub_norms=arch.startswith("bitnet"),
        int8_activations=arch.startswith("bitnet"),
        experts=experts,
    )


def _activation(file: GGUFFile, arch: str) -> Activation:
    """The architecture's own; files of llama.cpp's `bitnet` may name another."""
    key, own = f"{arch}.hidden_activation", _ACTIVATIONS.get(arch, "silu")
    named = file.metadata.get_str(key, "")
    if not named:
        return own
    if named not in _ACTIVATION_NAMES:
        known = ", ".join(_ACTIVATION_NAMES)
        raise UnsupportedModelError(file.metadata.field(key), named, f"must be one of {known}")
    return _ACTIVATION_NAMES[named]


def _refuse_features(file: GGUFFile, arch: str) -> None:
    meta = file.metadata
    if not meta.get_bool(f"{arch}.attention.causal", True):
        raise UnsupportedModelError(
            meta.field(f"{arch}.attention.causal"), False, "must be true: models that only embed are not implemented"
        )
    gating = meta.get_int(f"{arch}.expert_gating_func", 1)
    if gating != 1:
        raise UnsupportedModelError(
            meta.field(f"{arch}.expert_gating_func"),
            gating,
            "must be 1: routers other than softmax are not implemented",
        )
    scale = meta.get_float(f"{arch}.expert_weights_scale", 1.0)
    if scale not in (0.0, 1.0):  # 0 stands for none
        raise UnsupportedModelError(
            meta.field(f"{arch}.expert_weights_scale"), scale, "must be 1: scaled experts are not implemented"
        )


def _experts(file: GGUFFile, arch: str, layers: int) -> ExpertSpec | None:
    """The mixture of experts that the file describes, if any."""
    meta = file.metadata
    if FAMILIES[arch] == "mixture":
        count = meta.get_int(f"{arch}.expert_count", minimum=1, maximum=MAX_EXPERTS)
    else:
        count = meta.get_int(f"{arch}.expert_count", 0, maximum=MAX_EXPERTS)
    if not count:
        return None
    if FAMILIES[arch] != "mixture" and arch != "llama":
        key = meta.field(f"{arch}.expert_count")
        raise UnsupportedModelError(key, count, "must be 0: experts are implemented for llama, qwen2moe and qwen3moe")
    used = meta.get_int(f"{arch}.expert_used_count", minimum=1, maximum=max(count, 1))
    shared = 0
    if arch == "qwen2moe":
        rows = file.tensors.get("blk.0.ffn_gate_shexp.weight")
        shared = meta.get_int(f"{arch}.expert_shared_feed_forward_length", rows.shape[0] if rows else 0)
    total = f"{arch}.feed_forward_length"
    each = f"{arch}.expert_feed_forward_length"
    return ExpertSpec(
        count=count,
        used=used,
        ffn_dim=meta.get_int(each, 0, maximum=MAX_DIM) or _one_for_all(file, total, layers),
        normalized=arch != "qwen2moe",
        shared_ffn_dim=shared,
    )


def _one_for_all(file: GGUFFile, key: str, layers: int, default: int | None = None) -> int:
    values = file.metadata.get_int_per_layer(key, default, layers=layers, minimum=1, maximum=MAX_DIM)
    if len(set(values)) > 1:
        raise UnsupportedModelError(file.metadata.field(key), values, "must be the same in all layers")
    return values[0]


def _check_head_dim(file: GGUFFile, arch: str, heads: int, head_dim: int) -> None:
    meta = file.metadata
    if head_dim < 2 or head_dim % 2:  # may be a quotient
        raise WeightFileError(meta.field(f"{arch}.attention.key_length"), head_dim, "must be even and at least 2")
    if heads * head_dim > MAX_DIM:
        limit = MAX_DIM // head_dim
        raise WeightFileError(
            meta.field(f"{arch}.attention.head_count"), heads, f"must be at most {limit} for heads of {head_dim}"
        )
    key = f"{arch}.attention.value_length"
    value = meta.get_int(key, head_dim)
    if value != head_dim:
        raise UnsupportedModelError(meta.field(key), value, f"must equal the head dimension {head_dim}")


def _rope(file: GGUFFile, arch: str, head_dim: int, context: int) -> RopeSpec:
    """Frequencies for contexts of up to `context` tokens."""
    meta = file.metadata
    theta = meta.get_float(f"{arch}.rope.freq_base", 1e6 if arch == "gemma3" else 1e4, above=1.0)
    dims = meta.get_int(f"{arch}.rope.dimension_count", head_dim, minimum=2, maximum=head_dim)
    if dims != head_dim and (dims % 2 or arch in WHOLE_HEADS_ROTATE):
        limit = f"must equal the head dimension {head_dim}" if arch in WHOLE_HEADS_ROTATE else "must be even"
        raise UnsupportedModelError(meta.field(f"{arch}.rope.dimension_count"), dims, limit)
    # A factor without a kind is linear, as in llama.cpp.
    key = f"{arch}.rope.scaling.type"
    kind = meta.get_str(key, "linear")
    factor = meta.get_float(f"{arch}.rope.scaling.factor", 1.0, above=0.0)
    original = meta.get_int(f"{arch}.rope.scaling.original_context_length", 0) or meta.get_int(f"{arch}.context_length")
    magnitude = meta.get_float(f"{arch}.rope.scaling.attn_factor", 1.0, above=0.0)
    frequencies = rope.plain(theta, dims)
    if kind == "yarn":
        frequencies = rope.yarn(
            theta,
            dims,
            factor=factor,
            original=original,
            beta_fast=meta.get_float(f"{arch}.rope.scaling.yarn_beta_fast", 32.0, above=0.0),
            beta_slow=meta.get_float(f"{arch}.rope.scaling.yarn_beta_slow", 1.0, above=0.0),
        )
        magnitude *= rope.yarn_magnitude(factor)
    elif kind == "linear":
        frequencies = frequencies / factor
    elif kind not in ("none", "longrope"):
        raise UnsupportedModelError(meta.field(key), kind, "must be none, linear, yarn or longrope")
    divisors = next(
        (
            file.tensors[name].dequantize(slice(None)).reshape(-1)
            for name in ("rope_freqs.weight", f"rope_factors_{'long' if context > original else 'short'}.weight")
            if name in file.tensors
        ),
        None,
    )
    if divisors is not None:
        if divisors.shape != (dims // 2,) or not (divisors > 0).all():
            raise WeightFileError(
                f"{file.path}: rotary factors", divisors.shape, f"must be {dims // 2} positive numbers"
            )
        frequencies = frequencies / divisors
    local = None
    if arch == "gemma3":
        local = rope.plain(meta.get_float(f"{arch}.rope.freq_base_swa", GEMMA_LOCAL_THETA, above=1.0), dims)
    return RopeSpec(
        frequencies=rope.as_tuple(frequencies),
        local_frequencies=None if local is None else rope.as_tuple(local),
        magnitude=magnitude,
    )


def _windows(file: GGUFFile, arch: str, layers: int) -> tuple[int | None, ...]:
    """Tokens that each layer looks back."""
    meta = file.metadata
    window = meta.get_int(f"{arch}.attention.sliding_window", GEMMA_WINDOWS.get(arch, 0)) or None
    key = f"{arch}.attention.sliding_window_pattern"
    pattern = meta.get(key)
    if isinstance(pattern, np.ndarray):  # one bool a layer: does it have a window?
        if pattern.dtype != np.bool_ or len(pattern) != layers:
            raise WeightFileError(meta.field(key), f"array of {len(pattern)}", f"must be an integer or {layers} bools")
        return tuple(window if windowed else None for windowed in pattern.tolist())
    every = meta.get_int(key, GEMMA_PATTERNS.get(arch, 0))  # the last layer of so many sees everything; 0: none does
    return tuple(None if every and (layer + 1) % every == 0 else window for layer in range(layers))


def _attention_scale(arch: str, layers: int, dim: int, heads: int, head_dim: int) -> float:
    if layers == GEMMA_27B_LAYERS.get(arch):
        return 1.0 / math.sqrt(dim / heads)
    return 1.0 / math.sqrt(head_dim)


def _rows_of(file: GGUFFile, name: str) -> int:
    if name not in file.tensors:
        raise WeightFileError(f"{file.path}: tensor {name!r}", None, "is missing")
    shape = file.tensors[name].shape
    if len(shape) != 2:
        raise WeightFileError(f"{file.path}: tensor {name!r} shape", shape, "must have two dimensions")
    return shape[0]
