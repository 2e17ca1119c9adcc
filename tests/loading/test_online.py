"""Dense weights of layers are quantized while they load; everything else arrives as it is."""

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from atoma_jax import ops
from atoma_jax.config import ModelConfig
from atoma_jax.engine.model_setup import set_up_model
from atoma_jax.errors import ConfigError
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.model_files import open_model
from atoma_jax.quant.online import quantize_rows
from atoma_jax.quant.qtensor import QTensor

Q = gguf.GGMLQuantizationType
SCHEMES = {"int8": "int8", "int4": "int4", "fp8": "fp8", "ternary": "ternary", "w8a8": "int8_channel"}


@pytest.fixture
def set_up(tmp_path, tiny_model):
    def set_up(*, kinds=lambda name: Q.F32, **settings):
        path = tmp_path / "model.gguf"
        exact = tiny_model(types=kinds).write(path)
        with open_model(resolve(str(path))) as files:
            setup = set_up_model(ModelConfig(model=str(path), dtype="float32", **settings), files)
            weights = nnx.to_flat_state(setup.load(threads=2))
        return setup, {".".join(map(str, path)): leaf.get_value() for path, leaf in weights}, exact

    return set_up


def values_of(weight: QTensor) -> np.ndarray:
    """Of the rows layout."""
    assert weight.layout == "rows"
    codes = np.asarray(weight.codes)
    numbers = codes.view(ml_dtypes.float8_e4m3fn) if codes.dtype == np.uint8 else codes
    values = numbers.astype(np.float32) * np.asarray(weight.scales)[..., None]
    if weight.mins is not None:
        values = values - np.asarray(weight.mins)[..., None]
    return values.reshape(*weight.lead, *weight.shape)


@pytest.mark.parametrize("quantization", SCHEMES)
def test_layers_get_the_codes_of_their_scheme(set_up, quantization):
    setup, weights, exact = set_up(quantization=quantization)
    for layer in range(2):
        want = quantize_rows(exact[f"blk.{layer}.ffn_down.weight"], SCHEMES[quantization]).values()
        np.testing.assert_array_equal(values_of(weights["layers.down"])[layer], want)
    assert setup.spec.int8_activations == (quantization == "w8a8")
    for name in ("embed", "layers.attn_norm", "final_norm"):
        assert isinstance(weights[name], jax.Array), name
    np.testing.assert_array_equal(weights["embed"], exact["token_embd.weight"])


def test_w8a8_multiplies_integers(set_up):
    setup, weights, exact = set_up(quantization="w8a8")
    down = jax.tree.map(lambda leaf: leaf[0], weights["layers.down"])
    x = np.random.default_rng(4).standard_normal((3, 512)).astype(np.float32)
    got = ops.linear(jnp.asarray(x), down, setup.backend, int8_activations=True)
    scale = 127 / np.abs(x).max(axis=1, keepdims=True)
    rows = quantize_rows(exact["blk.0.ffn_down.weight"], "int8_channel").values().astype(np.float64)
    np.testing.assert_allclose(got, np.rint(x * scale) @ rows.T / scale, rtol=1e-5, atol=1e-4)


def test_w8a8_keeps_rows_whatever_the_platform_packs(set_up):
    with pytest.raises(ConfigError, match="weight_layout: contradicts --quantization w8a8"):
        set_up(quantization="w8a8", weight_layout="planar")


def test_packed_weights_are_as_narrow_as_their_scheme(set_up):
    setup, weights, _ = set_up(quantization="int4", weight_layout="planar")
    down = weights["layers.down"]
    assert (down.bits, 8 * down.nbytes / (2 * 256 * 512)) == (4, 5.0)
    assert setup.weight_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(weights))


def test_what_is_quantized_already_stays_as_it_is(set_up):
    _, weights, exact = set_up(kinds=lambda name: Q.Q8_0 if "ffn_down" in name else Q.F32, quantization="int4")
    np.testing.assert_array_equal(values_of(weights["layers.down"])[1], exact["blk.1.ffn_down.weight"])
    assert weights["layers.gate_up"].mins is not None, "int4 has mins"


def test_a_model_without_dense_layers_is_refused_by_name(set_up):
    with pytest.raises(ConfigError, match=r"quantization: has nothing to quantize: the layers of model.gguf are Q8_0"):
        set_up(kinds=lambda name: Q.Q8_0, quantization="int8")
