"""A `ModelSpec` from a GGUF file's metadata and tensor names. Reads no weights; tensors are `names.py`'s."""

import math

import numpy as np

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.gguf import GGUFFile
from atoma_jax.model_spec import Family, ModelSpec

FAMILIES: dict[str, Family] = {"llama": "llama", "qwen2": "llama", "qwen3": "llama", "gemma3": "gemma"}

MAX_LAYERS = 1024
MAX_DIM = 1 << 20
MAX_HEAD_DIM = 1024
GEMMA_LOCAL_THETA = 10_000.0  # not in the metadata of most files
GEMMA_WINDOW = 512  # likewise
GEMMA_PATTERN = 6  # likewise: every sixth layer sees everything
GEMMA_27B_LAYERS = 62  # the one size whose queries are scaled by the width of a head's share, not by the head dim


def read_spec(file: GGUFFile) -> ModelSpec:
    """The shape of the model in `file`.

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
    family = FAMILIES[arch]
    theta = meta.get_float(f"{arch}.rope.freq_base", 1e6 if family == "gemma" else 1e4, above=0.0)
    return ModelSpec(
        architecture=arch,
        family=family,
        vocab_size=_rows_of(file, "token_embd.weight"),
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_dim=_one_for_all(file, f"{arch}.feed_forward_length", layers),
        context_length=meta.get_int(f"{arch}.context_length", minimum=1),
        norm_eps=meta.get_float(f"{arch}.attention.layer_norm_rms_epsilon", minimum=0.0),
        rope_theta=theta,
        rope_factor=_rope_factor(file, arch),
        local_rope_theta=meta.get_float(f"{arch}.rope.freq_base_swa", GEMMA_LOCAL_THETA, above=0.0)
        if family == "gemma"
        else None,
        windows=_windows(file, arch, layers),
        attention_scale=_attention_scale(family, layers, dim, heads, head_dim),
        attention_softcap=meta.get_float(f"{arch}.attn_logit_softcapping", None, above=0.0),
        final_softcap=meta.get_float(f"{arch}.final_logit_softcapping", None, above=0.0),
        embedding_scale=math.sqrt(dim) if family == "gemma" else 1.0,
        activation="gelu_tanh" if family == "gemma" else "silu",
        tied_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        rope_frequency_divisors="rope_freqs.weight" in file.tensors,
    )


def _refuse_features(file: GGUFFile, arch: str) -> None:
    meta = file.metadata
    experts = meta.get_int(f"{arch}.expert_count", 0)
    if experts:
        raise UnsupportedModelError(
            meta.field(f"{arch}.expert_count"), experts, "must be 0: mixtures of experts are not implemented"
        )
    if not meta.get_bool(f"{arch}.attention.causal", True):
        raise UnsupportedModelError(
            meta.field(f"{arch}.attention.causal"), False, "must be true: models that only embed are not implemented"
        )
    scaling = _rope_scaling(file, arch)
    if scaling not in ("none", "linear"):
        raise UnsupportedModelError(meta.field(f"{arch}.rope.scaling.type"), scaling, "must be none or linear")


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
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        value = meta.get_int(key, head_dim)
        if value != head_dim:
            raise UnsupportedModelError(meta.field(key), value, f"must equal the head dimension {head_dim}")


def _rope_factor(file: GGUFFile, arch: str) -> float:
    if _rope_scaling(file, arch) == "none":
        return 1.0
    return file.metadata.get_float(f"{arch}.rope.scaling.factor", 1.0, above=0.0)


def _rope_scaling(file: GGUFFile, arch: str) -> str:
    """The kind of scaling; a factor without a kind is linear, as in llama.cpp."""
    return file.metadata.get_str(f"{arch}.rope.scaling.type", "linear")


def _windows(file: GGUFFile, arch: str, layers: int) -> tuple[int | None, ...]:
    """Tokens that each layer looks back."""
    meta, gemma = file.metadata, FAMILIES[arch] == "gemma"
    window = meta.get_int(f"{arch}.attention.sliding_window", GEMMA_WINDOW if gemma else 0) or None
    key = f"{arch}.attention.sliding_window_pattern"
    pattern = meta.get(key)
    if isinstance(pattern, np.ndarray):  # one bool a layer: does it have a window?
        if pattern.dtype != np.bool_ or len(pattern) != layers:
            raise WeightFileError(meta.field(key), f"array of {len(pattern)}", f"must be an integer or {layers} bools")
        return tuple(window if windowed else None for windowed in pattern.tolist())
    every = meta.get_int(key, GEMMA_PATTERN if gemma else 0)  # the last layer of so many sees everything; 0: none does
    return tuple(None if every and (layer + 1) % every == 0 else window for layer in range(layers))


def _attention_scale(family: Family, layers: int, dim: int, heads: int, head_dim: int) -> float:
    if family == "gemma" and layers == GEMMA_27B_LAYERS:
        return 1.0 / math.sqrt(dim // heads)
    return 1.0 / math.sqrt(head_dim)


def _rows_of(file: GGUFFile, name: str) -> int:
    if name not in file.tensors:
        raise WeightFileError(f"{file.path}: tensor {name!r}", None, "is missing")
    return file.tensors[name].shape[0]
