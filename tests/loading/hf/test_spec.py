"""What is read of config.json and generation_config.json, and what is refused. Parity is for tests/models to show."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoma_jax.errors import UnsupportedModelError, UserError, WeightFileError
from atoma_jax.loading.fetch.hub import ResolvedModel
from atoma_jax.loading.generation_defaults import GenerationDefaults, read_generation_defaults
from atoma_jax.loading.hf.spec import ARCHITECTURES, read_hf_spec
from atoma_jax.loading.json_file import Section
from atoma_jax.loading.model_files import open_model
from atoma_jax.model_spec import ModelSpec

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def section(**changes: Any) -> Section:
    """A config; None leaves a key out."""
    left = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
    return Section("config.json: config", left)


def spec(architecture: str = "Llama", **changes: Any) -> ModelSpec:
    return read_hf_spec(section(architectures=[f"{architecture}ForCausalLM"], **changes))


def test_a_config_of_few_words_has_its_architectures_defaults() -> None:
    found = spec()
    assert (found.num_kv_heads, found.head_dim, found.windows) == (4, 16, ())
    assert (found.activation, found.attention_scale, found.embedding_scale) == ("silu", 0.25, 1.0)
    switches = (found.tied_embeddings, found.qkv_bias, found.qk_norm, found.sub_norms, found.int8_activations)
    assert switches == (False,) * 5
    assert spec("Qwen2").qkv_bias
    assert (spec("Qwen3").qk_norm, spec("Qwen3").head_dim) == (True, 128)
    assert spec("Mistral").windows == (4096,) * 4
    gemma = spec("Gemma2")
    assert (gemma.activation, gemma.head_dim, gemma.embedding_scale, gemma.attention_scale) == (
        "gelu_tanh",
        256,
        8.0,
        1 / 16,
    )
    assert (gemma.attention_softcap, gemma.final_softcap, gemma.tied_embeddings) == (50.0, 30.0, True)
    assert (spec("BitNet").sub_norms, spec("BitNet").activation) == (True, "relu_squared")


def test_a_null_says_that_there_is_none() -> None:
    config = section(architectures=["Gemma2ForCausalLM"])
    nothing = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": None}
    found = read_hf_spec(Section("config", {**config.values, **nothing}))
    assert (found.attention_softcap, found.final_softcap, found.windows) == (None, None, ())
    config = section(architectures=["MistralForCausalLM"])
    assert read_hf_spec(Section("config", {**config.values, "sliding_window": None})).windows == ()


SWITCHED = {"use_sliding_window": True, "sliding_window": 10}


@pytest.mark.parametrize(
    ("architecture", "settings", "expected"),
    [
        ("Llama", {"sliding_window": 10}, ()),
        ("Mistral", {"sliding_window": 10}, (10, 10, 10, 10)),
        ("Phi3", {}, ()),
        ("Phi3", {"sliding_window": 10}, (10, 10, 10, 10)),
        ("Mixtral", EXPERTS, ()),
        ("Qwen2", {"sliding_window": 10, "max_window_layers": 1}, ()),
        ("Qwen2", {**SWITCHED, "max_window_layers": 1}, (None, 10, 10, 10)),
        ("Qwen3", {**SWITCHED, "layer_types": ["sliding_attention", *["full_attention"] * 3]}, (10, None, None, None)),
        (
            "Qwen2Moe",
            {**EXPERTS, **SWITCHED, "shared_expert_intermediate_size": 8, "max_window_layers": 3},
            (10, None, 10, None),
        ),
        ("Qwen3Moe", {**EXPERTS, **SWITCHED}, (10, 10, 10, 10)),
        ("Gemma2", {"sliding_window": 10}, (10, None, 10, None)),
        ("Gemma3", {"sliding_window": 10}, (10, 10, 10, 10)),
        ("Gemma3", {"sliding_window": 10, "sliding_window_pattern": 3}, (10, 10, None, 10)),
    ],
)
def test_each_layer_has_its_window(architecture: str, settings: dict[str, Any], expected: tuple) -> None:
    assert spec(architecture, **settings).windows == expected


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_experts(key: str) -> None:
    settings = {**EXPERTS, "num_experts": None, key: 8}
    found = spec("Qwen3Moe", **settings, norm_topk_prob=True).experts
    assert found is not None
    assert (found.count, found.used, found.ffn_dim, found.normalized, found.shared_ffn_dim) == (8, 2, 32, True, 0)
    found = spec("Qwen2Moe", **settings, shared_expert_intermediate_size=48).experts
    assert found is not None
    assert (found.normalized, found.shared_ffn_dim) == (False, 48)
    found = spec("Mixtral", **settings).experts
    assert found is not None
    assert (found.ffn_dim, found.normalized) == (96, True)


def test_an_unknown_architecture_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        spec("GPT2")
    assert str(caught.value).startswith("config.json: config.architectures: must be one of BitNetForCausalLM, ")
    assert all(name in str(caught.value) for name in ARCHITECTURES)


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("Llama", {"mlp_bias": True}, "mlp_bias: must be false: biases of feed-forward nets"),
        ("Mistral", {"attention_bias": True}, "attention_bias: must be false: this architecture has none"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act: is not implemented; .* silu, gelu_pytorch_tanh, relu2, got 'ge"),
        ("Gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention: must be false"),
        ("Llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: must be left out"),
        (
            "Qwen3",
            {**SWITCHED, "layer_types": ["chunked_attention"] * 4},
            "layer_types: is not implemented; .* sliding",
        ),
        (
            "Mistral",
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "layer_types: must be the same in all layers",
        ),
        ("Qwen3Moe", {**EXPERTS, "decoder_sparse_step": 2}, "decoder_sparse_step: must be 1: layers without experts"),
        ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": [0]}, "mlp_only_layers: must be empty: layers without experts"),
        ("Llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type: is not implemented"),
    ],
)
def test_features_that_are_not_implemented_are_refused(
    architecture: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"config.json: config.{message}"):
        spec(architecture, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": []}, "architectures: must name one architecture, and must be one of"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"hidden_size": 1 << 21}, r"hidden_size: must be a whole number in \[1, 1048576\], got 2097152"),
        ({"hidden_size": "64"}, "hidden_size: must be a whole number in .*, got '64'"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers: must be a whole number in \[1, 1024\], got 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers: must be a whole number in .*, got True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: must divide the 4 heads, got 3"),
        ({"num_key_value_heads": 8}, r"num_key_value_heads: must be a whole number in \[1, 4\], got 8"),
        ({"head_dim": 15}, r"head_dim: must be even and in \[2, 1024\], got 15"),
        ({"num_attention_heads": 128}, r"head_dim: must be even and in \[2, 1024\], got 0"),
        ({"hidden_size": 1 << 20, "num_attention_heads": 4}, r"head_dim: must be even and in \[2, 1024\], got 262144"),
        ({"num_attention_heads": 1 << 19, "head_dim": 4}, "num_attention_heads: must be at most 262144 for heads of 4"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps: must be a number in \[0, 1\], got nan"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings: must be a whole number in"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: must be true or false, got 'yes'"),
        ({"layer_types": [1]}, r"layer_types: must be a list of strings, got \[1\]"),
        (
            {"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full_attention"]},
            "layer_types: must be a list of 4, as there are layers, got 'list of 1'",
        ),
        (
            {"architectures": ["Qwen3MoeForCausalLM"], **EXPERTS, "num_experts_per_tok": 9},
            r"num_experts_per_tok: must be a whole number in \[1, 8\], got 9",
        ),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightFileError, match=f"config.json: config.{message}"):
        read_hf_spec(section(**settings))


HOSTILE = (
    -1,
    0,
    3,
    2**31,
    10**400,
    -0.5,
    1e300,
    float("nan"),
    float("inf"),
    "x",
    "",
    [],
    {},
    [1],
    {"a": 1},
    True,
    None,
)
FULL = {
    "Gemma3": {
        "sliding_window": 10,
        "sliding_window_pattern": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 1.0,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {}},
    },
    "Phi3": {
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    },
    "Qwen2Moe": {
        **EXPERTS,
        **SWITCHED,
        "shared_expert_intermediate_size": 8,
        "max_window_layers": 2,
        "qkv_bias": True,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rope_theta": 1e4,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32},
    },
    "Llama": {
        "attention_bias": False,
        "layer_types": ["full_attention"] * 4,
        "hidden_act": "silu",
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}


@pytest.mark.parametrize("architecture", FULL)
def test_whatever_a_value_becomes_the_config_is_read_or_refused(architecture: str) -> None:
    config = {**LLAMA, "architectures": [f"{architecture}ForCausalLM"], **FULL[architecture]}
    read_hf_spec(Section("config", config))
    refused = 0
    changed = [{**config, key: value} for key in config for value in HOSTILE]
    for name in ("rope_parameters", "rope_scaling"):
        for key in config.get(name, {}):
            changed += [{**config, name: {**config[name], key: value}} for value in HOSTILE]
    for one in changed:
        try:
            spec = read_hf_spec(Section("config", one))
            assert np.isfinite(spec.rope.frequencies).all()
            assert spec.num_heads * spec.head_dim <= 1 << 20
        except UserError:
            refused += 1
    assert len(changed) / 2 < refused < len(changed)


# Sampling settings


def defaults(**settings: Any) -> GenerationDefaults:
    return read_generation_defaults(Section("generation_config.json: generation_config", settings))


def test_sampling_settings_are_those_of_the_file() -> None:
    given = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}
    assert defaults(**given, max_new_tokens=512, do_sample=True, eos_token_id=[1, 2]) == GenerationDefaults(
        **given, max_new_tokens=512
    )
    assert defaults(temperature=1, top_k=None) == GenerationDefaults(temperature=1.0)
    assert defaults() == GenerationDefaults()


def test_without_sampling_the_likeliest_token_is_taken() -> None:
    assert defaults(do_sample=False, temperature=0.6, top_p=0.9) == GenerationDefaults(temperature=0.0, top_p=0.9)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", float("nan")),
        ("top_k", 0.5),
        ("top_k", 2**31),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
        ("do_sample", 1),
    ],
)
def test_sampling_settings_outside_of_their_limits_are_refused(key: str, value: object) -> None:
    with pytest.raises(WeightFileError, match=rf"generation_config\.json: generation_config\.{key}: must be"):
        defaults(**{key: value})


# Tensors


def tensors(layers: int = 4, D: int = 64, F: int = 96) -> dict[str, np.ndarray]:
    shapes = {"model.embed_tokens": (100, D), "lm_head": (100, D), "model.norm": (D,)}
    for layer in range(layers):
        within = {f"self_attn.{part}_proj": (D, D) for part in "qkvo"}
        within |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        within |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in within.items()}
    return {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}


def sources_of(folder: Path) -> int:
    """Checks where all weights are; their number."""
    from atoma_jax.models.decoder import Decoder
    from atoma_jax.models.params import specs_of
    from atoma_jax.ops import Backend

    with open_model(ResolvedModel(name="m", path=folder, kind="folder")) as files:
        backend = Backend(platform="cpu", operands="float32", weight_layout="rows")
        return len(files.sources(specs_of(Decoder(files.spec, backend))))


def test_what_says_nothing_may_be_there(hf_folder) -> None:
    spare = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    assert sources_of(hf_folder({**tensors(), **spare}, **LLAMA)) == 9
    assert sources_of(hf_folder({**tensors(), **spare}, **LLAMA, tie_word_embeddings=True)) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.1.self_attn.o_proj.bias": np.zeros(64, np.float32)}, "o_proj.bias'.* has no place in a Llama"),
        ({"model.layers.1.self_attn.q_norm.weight": np.zeros(16, np.float32)}, "q_norm.weight'.* has no place"),
    ],
)
def test_a_tensor_without_a_place_is_refused_by_name(hf_folder, change: dict, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        sources_of(hf_folder({**tensors(), **change}, **LLAMA))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_head.weight": None}, "tensor 'lm_head.weight': is missing"),
        ({"model.layers.3.mlp.up_proj.weight": None}, "tensor 'model.layers.3.mlp.up_proj.weight': is missing"),
        (
            {"model.layers.0.mlp.down_proj.weight": np.zeros((64, 95), np.float32)},
            r"tensor 'model.layers.0.mlp.down_proj.weight' shape: must be \(64, 96\), got \(64, 95\)",
        ),
    ],
)
def test_tensors_must_be_what_the_config_says(hf_folder, change: dict, message: str) -> None:
    changed = {name: values for name, values in {**tensors(), **change}.items() if values is not None}
    with pytest.raises(WeightFileError, match=message):
        sources_of(hf_folder(changed, **LLAMA))


def test_biases_of_queries_keys_and_values(hf_folder) -> None:
    biases = {
        f"model.layers.{layer}.self_attn.{part}_proj.bias": np.zeros(64, np.float32)
        for layer in range(4)
        for part in "qkv"
    }
    assert sources_of(hf_folder({**tensors(), **biases}, **LLAMA, attention_bias=True)) == 10


@pytest.mark.parametrize(("value", "refused"), [(0.0, False), (1e-3, True)])
def test_biases_of_zeros_that_a_quantizer_added_are_passed_over(hf_folder, value: float, refused: bool) -> None:
    """GPTQ's tools once wrote a bias for every quantized layer."""
    parts = {name: values for name, values in tensors().items() if "mlp.down" not in name}
    for layer in range(4):
        module = f"model.layers.{layer}.mlp.down_proj"
        parts[f"{module}.qweight"] = np.zeros((96 // 8, 64), np.int32)
        parts[f"{module}.qzeros"] = np.zeros((96 // 32, 64 // 8), np.int32)
        parts[f"{module}.scales"] = np.ones((96 // 32, 64), np.float16)
        parts[f"{module}.bias"] = np.full(64, value, np.float16)
    folder = hf_folder(parts, {"quant_method": "gptq", "bits": 4, "group_size": 32}, **LLAMA)
    if not refused:
        assert sources_of(folder) == 9
        return
    with pytest.raises(UnsupportedModelError, match=r"down_proj\.bias'.* has no place in a Llama"):
        sources_of(folder)


def test_an_open_folder_has_its_makers_sampling_settings(hf_folder) -> None:
    folder = hf_folder(tensors(), **LLAMA)
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    with open_model(ResolvedModel(name="m", path=folder, kind="folder")) as files:
        assert files.generation_defaults == GenerationDefaults(temperature=0.7)
