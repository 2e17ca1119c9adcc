"""A file's metadata becomes the right model, or an error that names the key."""

import math

import numpy as np
import pytest

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.gguf.file import GGUFFile
from atoma_jax.loading.gguf.spec import read_spec
from atoma_jax.model_spec import RopeSpec


def plain_frequencies(theta: float, dims: int = 64) -> tuple[float, ...]:
    return tuple(theta ** (-i / dims) for i in range(0, dims, 2))


@pytest.fixture
def spec_of(tmp_path, tiny_model):
    def read(**changes):
        tiny_model(**changes).write(tmp_path / "model.gguf")
        with GGUFFile.open(tmp_path / "model.gguf") as file:
            return read_spec(file)

    return read


def test_a_llama_file_with_nothing_but_the_required_keys(spec_of):
    spec = spec_of()
    assert (spec.dim, spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (256, 2, 4, 2, 64)
    assert (spec.ffn_dim, spec.vocab_size, spec.context_length) == (512, 40, 128)
    assert (spec.family, spec.activation, spec.embedding_scale) == ("llama", "silu", 1.0)
    assert (spec.rope, spec.attention_scale) == (RopeSpec(frequencies=plain_frequencies(1e4)), 1 / 8)
    assert spec.windows == (None, None)
    assert spec.tied_embeddings
    assert (spec.qkv_bias, spec.qk_norm, spec.sub_norms, spec.experts) == (False, False, False, None)


def test_tensors_switch_features_on(spec_of):
    spec = spec_of(
        arch="qwen2",
        tensors={
            "output.weight": (40, 256),
            "blk.0.attn_q.bias": (256,),
            "blk.0.attn_q_norm.weight": (64,),
        },
    )
    assert not spec.tied_embeddings
    assert spec.qkv_bias
    assert spec.qk_norm


def test_gemma_fills_in_what_its_files_leave_out(spec_of):
    spec = spec_of(arch="gemma3", metadata={"block_count": 14})
    assert spec.windows == ((512,) * 5 + (None,)) * 2 + (512, 512)
    assert spec.rope == RopeSpec(frequencies=plain_frequencies(1e6), local_frequencies=plain_frequencies(1e4))
    assert (spec.embedding_scale, spec.activation) == (16.0, "gelu_tanh")
    assert spec.attention_scale == 1 / 8


def test_the_largest_gemma_scales_queries_by_the_width_of_a_share(spec_of):
    spec = spec_of(arch="gemma3", metadata={"block_count": 62, "attention.key_length": 128})
    assert spec.attention_scale == 1 / math.sqrt(256 // 4)


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        (2, (64, None, 64)),
        ([True, False, True], (64, None, 64)),
        ([False, False, False], (None, None, None)),
        (0, (64, 64, 64)),
    ],
)
def test_a_file_may_say_which_layers_have_a_window(spec_of, pattern, windows):
    metadata = {"block_count": 3, "attention.sliding_window": 64, "attention.sliding_window_pattern": pattern}
    assert spec_of(arch="gemma3", metadata=metadata).windows == windows


@pytest.mark.parametrize(("window", "windows"), [(32, (32, 32)), (0, (None, None))])
def test_a_window_of_a_llama_file_is_of_all_layers_and_zero_is_none(spec_of, window, windows):
    assert spec_of(metadata={"attention.sliding_window": window}).windows == windows


def test_rope_scaling(spec_of):
    plain = np.asarray(plain_frequencies(1e4))

    def frequencies(**metadata):
        return np.asarray(spec_of(metadata={f"rope.{key}": value for key, value in metadata.items()}).rope.frequencies)

    np.testing.assert_allclose(frequencies(**{"scaling.type": "linear", "scaling.factor": 8.0}), plain / 8)
    np.testing.assert_allclose(frequencies(**{"scaling.factor": 4.0}), plain / 4)  # llama.cpp's default is linear too
    np.testing.assert_allclose(frequencies(**{"scaling.type": "none", "scaling.factor": 4.0}), plain)


@pytest.mark.parametrize("pairs", [32, 16])  # the right number of them, but some are negative; too few
def test_divisors_of_frequencies_must_be_positive_and_one_for_each_pair(spec_of, pairs):
    with pytest.raises(WeightFileError, match="32 positive numbers"):
        spec_of(tensors={"rope_freqs.weight": (pairs,)})


@pytest.mark.parametrize(
    ("arch", "named", "activation"),
    [
        ("bitnet", None, "silu"),
        ("bitnet", "relu2", "relu_squared"),
        ("bitnet-b1.58", None, "relu_squared"),
        ("llama", None, "silu"),
    ],
)
def test_activations(spec_of, arch, named, activation):
    assert spec_of(arch=arch, metadata={"hidden_activation": named}).activation == activation


def test_softcaps(spec_of):
    spec = spec_of(arch="gemma3", metadata={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0})
    assert (spec.attention_softcap, spec.final_softcap) == (50.0, 30.0)


BROKEN = {
    "attention.layer_norm_rms_epsilon": [math.nan, math.inf, -1.0, None, 1],
    "rope.freq_base": [0.0, -1.0, math.inf],
    "rope.scaling.factor": [0.0, math.nan],
    "block_count": [0, 1025, 2**32 - 1, None],
    "embedding_length": [0, 2**20 + 1, None],
    "attention.head_count": [0, 2**20 + 1, None],
    "attention.head_count_kv": [0, 3, 8],
    "attention.key_length": [0, 1, 63, 1025],
    "context_length": [0, None],
    "feed_forward_length": [0, None, [512, 512, 512]],
    "attention.sliding_window_pattern": [[True], [1, 0], "all"],
    "attn_logit_softcapping": [0.0, math.nan],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BROKEN.items() for value in values])
def test_a_broken_value_is_an_error_that_names_its_key(spec_of, key, value):
    with pytest.raises(WeightFileError) as caught:
        spec_of(metadata={key: value})
    assert f"llama.{key}" in caught.value.field


UNSUPPORTED = {
    "expert_gating_func": 2,
    "expert_weights_scale": 2.5,
    "rope.scaling.type": "ntk",
    "hidden_activation": "mish",
    "attention.value_length": 32,
    "rope.dimension_count": 32,
    "attention.head_count": [4, 8],
    "attention.head_count_kv": [2, 4],
    "feed_forward_length": [512, 256],
    "attention.causal": False,
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_a_feature_that_is_not_there_is_refused_by_name(spec_of, key):
    with pytest.raises(UnsupportedModelError) as caught:
        spec_of(metadata={key: UNSUPPORTED[key]})
    assert f"llama.{key}" in caught.value.field


def test_one_value_for_each_layer_is_fine_while_they_agree(spec_of):
    assert spec_of(metadata={"attention.head_count_kv": [2, 2], "feed_forward_length": [512, 512]}).num_kv_heads == 2


def test_an_unknown_architecture_lists_the_known_ones(spec_of):
    with pytest.raises(UnsupportedModelError, match="gemma3, llama, phi3, qwen2, qwen2moe, qwen3") as caught:
        spec_of(arch="rwkv7")
    assert caught.value.value == "rwkv7"
    assert "general.architecture" in caught.value.field


def test_more_heads_than_width_is_an_error_where_the_head_dim_is_a_quotient(spec_of):
    with pytest.raises(WeightFileError, match="key_length"):
        spec_of(metadata={"attention.head_count": 512, "attention.head_count_kv": 512})


def test_heads_that_would_make_an_index_of_gigabytes_are_refused(spec_of):
    with pytest.raises(WeightFileError, match="head_count"):
        spec_of(metadata={"attention.head_count": 2**20, "attention.head_count_kv": 1, "attention.key_length": 1024})


def test_a_file_without_an_embedding(spec_of):
    with pytest.raises(WeightFileError, match="token_embd"):
        spec_of(tensors={"token_embd.weight": None})


def test_numbers_of_layers_are_not_taken_for_bools(spec_of):
    with pytest.raises(WeightFileError, match="sliding_window_pattern"):
        spec_of(arch="gemma3", metadata={"attention.sliding_window_pattern": np.asarray([1, 0]).tolist()})
