"""Small random `transformers` models of every family, with what their GGUF files say, and what they answer."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `oracle`: torch")
transformers = pytest.importorskip("transformers", reason="needs the extra `oracle`: transformers")

VOCAB = 203
CONTEXT = 256
LENGTHS = (45, 22, 9)  # of three sequences that run together
ATTENTION_SOFTCAP = 1.5
TOKENS = 80  # of a step: all of them at once and padding
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
    "attn_implementation": "eager",
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llama3_divisors(head_dim: int) -> np.ndarray:
    """`rope_freqs.weight` as llama.cpp's converter computes it from LLAMA3_ROPE."""
    scaling = LLAMA3_ROPE
    frequencies = 1.0 / scaling["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    old = scaling["original_max_position_embeddings"]
    low, high = old / scaling["low_freq_factor"], old / scaling["high_freq_factor"]
    factors = []
    for wavelength in 2 * np.pi / frequencies:
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(scaling["factor"])
        else:
            smooth = (old / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    assert len(set(factors)) == 3, "kept, divided, and something between"
    return np.asarray(factors, np.float32)


def llama(**changes: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**COMMON, **changes}))


def llama_with_biases() -> Any:
    """Those of q, k and v, whose rows llama.cpp interleaves as well; that of the output has no place in a file."""
    model = llama(num_key_value_heads=2, attention_bias=True)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias = None
    return model


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_METADATA = {
    "rope.freq_base": 1e4,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
SHORT_FACTORS = [1.0, 1.1, 1.3, 1.6]  # of the pairs that rotate in a head of PHI3_HEAD, half of it
LONG_FACTORS = [1.0, 1.5, 2.5, 4.0]
PHI3_HEAD, PHI3_SHARE = 16, 0.5
EXPERTS, CHOSEN, EXPERT_WIDTH, SHARED_WIDTH = 6, 2, 32, 48


def phi3(**changes: Any) -> Any:
    config = {**COMMON, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2, **changes}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**config))


def longrope(original: int) -> Any:
    """A part of each head rotates; contexts are long above `original` tokens."""
    return phi3(
        original_max_position_embeddings=original,
        partial_rotary_factor=PHI3_SHARE,
        rope_scaling={"type": "longrope", "short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS},
    )


def longrope_file(original: int) -> dict[str, Any]:
    """As llama.cpp's converter writes it."""
    return {
        "arch": "phi3",
        "metadata": {
            "rope.dimension_count": int(PHI3_HEAD * PHI3_SHARE),
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(CONTEXT / original) / math.log(original)),
        },
        "extra": {
            "rope_factors_short.weight": np.asarray(SHORT_FACTORS, np.float32),
            "rope_factors_long.weight": np.asarray(LONG_FACTORS, np.float32),
        },
    }


def gemma2(**changes: Any) -> Any:
    config = {
        **COMMON,
        "num_hidden_layers": 3,  # the second without a window
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,  # what files of this size say: nothing but the head dim
        "sliding_window": 10,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "attn_logit_softcapping": ATTENTION_SOFTCAP,
        "final_logit_softcapping": 5.0,
    }
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**{**config, **changes}))


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        **COMMON, num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN
    )
    return transformers.MixtralForCausalLM(config)


def qwen2_moe(**changes: Any) -> Any:
    config = {
        **COMMON,
        "num_key_value_heads": 2,
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "moe_intermediate_size": EXPERT_WIDTH,
        "shared_expert_intermediate_size": SHARED_WIDTH,
    }
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**{**config, **changes}))


def qwen3_moe(**changes: Any) -> Any:
    config = {
        **COMMON,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "moe_intermediate_size": EXPERT_WIDTH,
        "norm_topk_prob": True,
    }
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**{**config, **changes}))


# The model, and what is beyond its parameters in its GGUF file.
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama 2": (lambda: llama(num_key_value_heads=4), {"arch": "llama", "metadata": {"rope.dimension_count": 16}}),
    "llama 3": (
        lambda: llama(num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        {"arch": "llama", "metadata": {"rope.freq_base": 5e5}},
    ),
    "llama 3.1": (
        lambda: llama(num_key_value_heads=1, head_dim=32, rope_parameters=LLAMA3_ROPE),
        {"arch": "llama", "metadata": {"rope.freq_base": 5e5}, "extra": {"rope_freqs.weight": llama3_divisors(32)}},
    ),
    "llama, linear scaling": (
        lambda: llama(num_key_value_heads=4, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
        {"arch": "llama", "metadata": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}},
    ),
    "llama, biases": (lambda: llama_with_biases(), {"arch": "llama"}),
    "smollm2": (
        lambda: llama(
            num_attention_heads=3, num_key_value_heads=1, hidden_size=96, head_dim=32, tie_word_embeddings=True
        ),
        {"arch": "llama"},
    ),
    "mistral": (
        lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(**COMMON, num_key_value_heads=2, head_dim=32, sliding_window=10)
        ),
        {"arch": "llama", "metadata": {"attention.sliding_window": 10}},
    ),
    "qwen2": (
        lambda: transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(
                **{**COMMON, "tie_word_embeddings": True},
                num_key_value_heads=2,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            )
        ),
        {"arch": "qwen2", "metadata": {"rope.freq_base": 1e6}},
    ),
    "qwen3": (
        lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=24)),
        {"arch": "qwen3", "metadata": {"rope.freq_base": 1e4}},
    ),
    "qwen2, yarn": (
        lambda: transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**COMMON, num_key_value_heads=2, rope_parameters=YARN)
        ),
        {"arch": "qwen2", "metadata": YARN_METADATA},
    ),
    "llama, yarn": (
        lambda: llama(num_key_value_heads=2, rope_parameters=YARN),
        {"arch": "llama", "metadata": YARN_METADATA},
    ),
    "phi 3": (
        lambda: phi3(sliding_window=10),
        {"arch": "phi3", "metadata": {"attention.sliding_window": 10}},
    ),
    "phi 3, short contexts": (lambda: longrope(64), longrope_file(64)),
    "phi 3, long contexts": (lambda: longrope(8), longrope_file(8)),
    "mixtral": (
        lambda: mixtral(),
        {
            "arch": "llama",
            "metadata": {"rope.freq_base": 1e6, "expert_count": EXPERTS, "expert_used_count": CHOSEN},
        },
    ),
    "qwen2 moe": (
        lambda: qwen2_moe(),
        {
            "arch": "qwen2moe",
            "metadata": {
                "expert_count": EXPERTS,
                "expert_used_count": CHOSEN,
                "expert_feed_forward_length": EXPERT_WIDTH,
                "expert_shared_feed_forward_length": SHARED_WIDTH,
            },
        },
    ),
    "qwen3 moe": (
        lambda: qwen3_moe(),
        {
            "arch": "qwen3moe",
            "metadata": {
                "rope.freq_base": 1e4,
                "expert_count": EXPERTS,
                "expert_used_count": CHOSEN,
                "expert_feed_forward_length": EXPERT_WIDTH,
            },
        },
    ),
    "gemma 2": (
        lambda: gemma2(),
        {
            "arch": "gemma2",
            "metadata": {
                "attention.sliding_window": 10,
                "attn_logit_softcapping": ATTENTION_SOFTCAP,
                "final_logit_softcapping": 5.0,
            },
        },
    ),
    "gemma 3": (
        lambda: gemma(),
        {"arch": "gemma3", "metadata": {"attention.sliding_window": 10, "rope.freq_base": 1e6}},
    ),
    "gemma 3, softcaps": (
        lambda: gemma(attn_logit_softcapping=ATTENTION_SOFTCAP, final_logit_softcapping=5.0),
        {
            "arch": "gemma3",
            "metadata": {
                "attention.sliding_window": 10,
                "rope.freq_base": 1e6,
                "attn_logit_softcapping": ATTENTION_SOFTCAP,
                "final_logit_softcapping": 5.0,
            },
        },
    ),
}


def gemma(**changes: Any) -> Any:
    config = {
        **COMMON,
        "num_hidden_layers": 7,  # five with a window, one without, one with
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,  # what files of this architecture say: nothing but the head dim
        "sliding_window": 10,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
    }
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**{**config, **changes}))


# Lengths of contexts to serve, where they are not the model's own.
SERVED = {"phi 3, short contexts": 64}


def build(family: str) -> Any:
    """The model, with norms and biases as random as its matrices."""
    return randomized(FAMILIES[family][0])


def randomized(make: Callable[[], Any]) -> Any:
    """A model whose norms and biases are as random as its matrices."""
    torch.manual_seed(11)
    model = make().eval()
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, VOCAB, length).astype(np.int32) for length in LENGTHS]


def reference(model: Any, ids: list[np.ndarray]) -> list[np.ndarray]:
    # Gemma 3 has the setting, and eager attention the argument, but nothing in `transformers` connects the two.
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    settings = {} if softcap is None or "gemma2" in model.config.model_type else {"softcap": softcap}
    with torch.no_grad():
        return [model(torch.from_numpy(one[None].astype(np.int64)), **settings).logits[0].numpy() for one in ids]


def at_once(work: Any) -> list[list[Any]]:
    return [[work(i, length) for i, length in enumerate(LENGTHS)]]


def in_pieces(work: Any) -> list[list[Any]]:
    """Ragged chunks, decode beside prefill in changing rows, then decode alone: two rows, then one."""
    steps = [
        [work(0, 17), work(1, 3)],
        [work(1, 12), work(2, 5), work(0, 20)],
        [work(1, 1, decode=True), work(0, 2)],
        [work(2, 1, decode=True), work(1, 1, decode=True), work(0, 1)],
        [work(0, 1, decode=True), work(2, 1, decode=True), work(1, 1)],
        [work(2, 2), work(1, 4)],
    ]
    return steps + [[work(0, 1, decode=True)] for _ in range(4)]
