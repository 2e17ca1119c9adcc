"""Checkpoints of compressed-tensors: what its own library writes decodes to what that library reads, bit for bit."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.hf.checkpoint import HFCheckpoint
from atoma_jax.loading.name_patterns import NamePatterns
from tests.loading.hf.values import assert_tensor_is, exact, opened, random_scales

torch = pytest.importorskip("torch", reason="needs the extra `oracle`: torch")
pytest.importorskip("compressed_tensors", reason="needs the extra `oracle`: compressed-tensors")

from compressed_tensors.compressors import BaseCompressor  # noqa: E402  behind the skip
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402

Write = Callable[..., Path]
BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
N, K = 48, 64
BLOCK = {"strategy": "block", "block_structure": [16, 32]}
GROUP = {"strategy": "group", "group_size": 16}
INT8_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def quantization(form: str, weights: dict[str, Any], **group: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, **group}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


def as_numpy(tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BF16)
    return tensor.view(torch.uint8).numpy().view(F8) if tensor.dtype == torch.float8_e4m3fn else tensor.numpy()


def written(form: str, weights: dict[str, Any], shape: tuple[int, int], dtype: Any) -> tuple[dict, np.ndarray]:
    """The parts of a layer as the library writes them, and the values that it reads of them in f32."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    rng = np.random.default_rng(0)
    bits, strategy = weights.get("num_bits", 8), weights["strategy"]
    counts = {"tensor": (1,), "channel": (shape[0], 1), "group": (shape[0], shape[1] // 16)}
    size = counts.get(strategy, (-(-shape[0] // 16), -(-shape[1] // 32)))
    scale = torch.from_numpy(np.abs(random_scales(*size, dtype=np.float32)) + np.float32(1e-3)).to(dtype)
    state = {"weight": torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) * 2, "weight_scale": scale}
    if not weights.get("symmetric", True):
        zeros = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), size)
        state["weight_zero_point"] = torch.from_numpy(zeros.astype(np.int8))
    compressor = BaseCompressor.get_value_from_registry(form)
    parts = compressor.compress(state, scheme)
    read = compressor.decompress({**parts, "weight_scale": scale.float()}, scheme)
    return {f"x.{name}": as_numpy(part) for name, part in parts.items()}, read["weight"].numpy()


@pytest.mark.parametrize("shape", [(N, K), (N - 5, K), (N, K - 16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("strategy", "group"), [(GROUP, 16), ({"strategy": "channel"}, 0)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_symmetric_integers(hf_folder: Write, bits, strategy, group, dtype, shape) -> None:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, **strategy}
    parts, values = written("pack-quantized", weights, shape, dtype)
    tensor = opened(hf_folder(parts, quantization("pack-quantized", weights)))
    facts = {"bits": bits, "zero": 2 ** (bits - 1), "group": group or shape[1], "type_name": f"INT{bits}-packed"}
    assert_tensor_is(tensor, values, permutation=None, **facts)


@pytest.mark.parametrize("shape", [(N, K), (N - 5, K)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strategy", [GROUP, {"strategy": "channel"}])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_integers_with_zero_points(hf_folder: Write, bits, strategy, dtype, shape) -> None:
    weights = {"num_bits": bits, "type": "int", "symmetric": False, **strategy}
    parts, values = written("pack-quantized", weights, shape, dtype)
    tensor = opened(hf_folder(parts, quantization("pack-quantized", weights)))
    assert_tensor_is(tensor, values, bits=bits, zero=128 if bits == 8 else 0, min_dtype=np.float32)


def test_scales_of_all_bits_with_zero_points_are_exact_but_for_the_mins(hf_folder: Write) -> None:
    """f32 scales round scale · zero: `dequantize` is exact, and `decode` misses it by what three roundings can do."""
    weights = {"num_bits": 8, "type": "int", "symmetric": False, **GROUP}
    parts, values = written("pack-quantized", weights, (N, K), torch.float32)
    tensor = opened(hf_folder(parts, quantization("pack-quantized", weights)))
    np.testing.assert_array_equal(tensor.dequantize(slice(None)), values)
    decoded = tensor.decode(slice(None))
    bound = np.float32(255) * decoded.scales.values.max() * np.finfo(np.float32).eps * 1.5
    np.testing.assert_allclose(decoded.values(), values, rtol=0, atol=bound)


def test_packed_integers_in_the_order_of_activations(hf_folder: Write) -> None:
    """`weight_g_idx` names each input's group; the library wrote it until version 0.17."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "actorder": "group", **GROUP}
    parts, _ = written("pack-quantized", {**weights, "actorder": None}, (N, K), torch.float16)
    order = np.random.default_rng(5).permutation(np.arange(K) // 16).astype(np.int32)
    words = parts["x.weight_packed"].view(np.uint32)
    codes = np.stack([words >> (4 * field) & 15 for field in range(8)], axis=-1).reshape(N, K)
    values = exact(codes, parts["x.weight_scale"], 8, order)
    tensor = opened(hf_folder({**parts, "x.weight_g_idx": order}, quantization("pack-quantized", weights)))
    np.testing.assert_array_equal(tensor.permutation, np.argsort(order, kind="stable"))
    assert_tensor_is(tensor, values)
    unset = {**parts, "x.weight_g_idx": np.full(K, -1, np.int32)}
    assert opened(hf_folder(unset, quantization("pack-quantized", weights))).permutation is None


@pytest.mark.parametrize("form", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("strategy", [{"strategy": "channel"}, {"strategy": "tensor"}, GROUP])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_of_a_byte(hf_folder: Write, form, strategy, symmetric, bits) -> None:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    parts, values = written(form, weights, (N, K), torch.bfloat16)
    tensor = opened(hf_folder(parts, quantization(form, weights)))
    assert_tensor_is(tensor, values, bits=8, zero=128, scale_dtype=BF16, type_name="INT8")


@pytest.mark.parametrize("form", ["float-quantized", "naive-quantized"])
@pytest.mark.parametrize("strategy", [{"strategy": "channel"}, {"strategy": "tensor"}, BLOCK])
@pytest.mark.parametrize("shape", [(N, K), (N - 5, K), (N, K - 10)])
def test_floats_of_a_byte(hf_folder: Write, form, strategy, shape) -> None:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, **strategy}
    parts, values = written(form, weights, shape, torch.bfloat16)
    group = np.gcd(32, shape[1]) if "block_structure" in strategy else shape[1]
    tensor = opened(hf_folder(parts, quantization(form, weights)))
    assert_tensor_is(tensor, values, bits=8, float_codes=True, group=group, type_name=f"FP8-{strategy['strategy']}")


# What a config says of layers and activations

W4 = {"num_bits": 4, "type": "int", "symmetric": True, **GROUP}
W8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


@pytest.mark.parametrize(
    ("activations", "expected"),
    [
        (INT8_TOKEN, "int8_token"),
        ({**INT8_TOKEN, "observer": "memoryless"}, "int8_token"),
        (None, None),
        ({**INT8_TOKEN, "symmetric": False}, None),
        ({**INT8_TOKEN, "dynamic": False, "strategy": "tensor"}, None),
        ({**INT8_TOKEN, "type": "float"}, None),
        ({**INT8_TOKEN, "num_bits": 4}, None),
    ],
)
def test_only_activations_of_int8_by_token_are_recorded(hf_folder: Write, activations, expected) -> None:
    parts, values = written("int-quantized", W8, (N, K), torch.bfloat16)
    parts["x.input_scale"] = np.ones(1, np.float32)
    folder = hf_folder(parts, quantization("int-quantized", W8, input_activations=activations))
    assert HFCheckpoint.open(folder).activation_scheme == expected
    assert_tensor_is(opened(folder), values)


def mixed(groups: dict[str, Any], **config: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups, **config}


def layers(**kinds: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Layers of four or eight bits by name, `_` for dots."""
    written_as = {"w4": written("pack-quantized", W4, (N, K), torch.bfloat16)}
    written_as["w8"] = written("int-quantized", W8, (N, K), torch.bfloat16)
    tensors, values = {}, {}
    for name, kind in kinds.items():
        parts, values[name.replace("_", ".")] = written_as[kind]
        tensors |= {part.replace("x.", name.replace("_", ".") + ".", 1): array for part, array in parts.items()}
    return tensors, values


@pytest.mark.parametrize(
    ("four", "eight"),
    [
        (["re:.*up$"], ["re:.*down$"]),
        (["Linear"], ["re:.*down$"]),  # an expression goes before a class
        (["re:.*"], ["a.down"]),  # a name before an expression
    ],
)
def test_each_layer_is_read_as_the_group_that_names_it_most_closely(hf_folder: Write, four, eight) -> None:
    tensors, values = layers(a_up="w4", a_down="w8")
    groups = {
        "four": {"targets": four, "weights": W4, "format": "pack-quantized", "input_activations": INT8_TOKEN},
        "eight": {"targets": eight, "weights": W8, "format": "int-quantized"},
    }
    checkpoint = HFCheckpoint.open(hf_folder({**tensors, "head.weight": np.ones((2, 4), np.float16)}, mixed(groups)))
    for name, expected in values.items():
        assert_tensor_is(checkpoint.tensors[f"{name}.weight"], expected)
    assert checkpoint.tensors["head.weight"].format is None
    assert checkpoint.activation_scheme is None  # the groups differ


def test_a_layer_of_the_top_is_no_class(hf_folder: Write) -> None:
    tensors, values = layers(a_up="w4", lm_head="w8")
    tensors = {name.replace("lm.head", "lm_head"): part for name, part in tensors.items()}
    groups = {
        "eight": {"targets": ["lm_head"], "weights": W8, "format": "int-quantized"},
        "four": {"targets": ["Linear"], "weights": W4, "format": "pack-quantized"},
    }
    checkpoint = HFCheckpoint.open(hf_folder(tensors, mixed(groups)))
    assert_tensor_is(checkpoint.tensors["lm_head.weight"], values["lm.head"])
    assert_tensor_is(checkpoint.tensors["a.up.weight"], values["a.up"])


def test_usual_expressions_are_within_the_limits() -> None:
    usual = ("re:.*mlp.gate$", "re:.*self_attn.*", r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj")
    found = NamePatterns.of("ignore", ("lm_head", *usual))
    assert found.names == {"lm_head"}
    assert found.matches("model.layers.3.mlp.experts.12.up_proj", "t")
    assert found.matches("model.layers.3.mlp.gate", "t")
    assert not found.matches("model.layers.3.mlp.gate_proj", "t")


def test_expressions_are_not_tried_on_names_without_end(hf_folder: Write) -> None:
    tensors, _ = layers(a_up="w4")
    long = {name.replace("a.up", "a" * 200): part for name, part in tensors.items()}
    config = {**quantization("pack-quantized", W4), "ignore": ["re:.*b"]}
    with pytest.raises(WeightFileError, match=r"weight_packed' name: must have at most 192 characters to try express"):
        HFCheckpoint.open(hf_folder(long, config))


def test_an_expression_that_is_none_is_refused(hf_folder: Write) -> None:
    config = {**quantization("pack-quantized", W4), "ignore": ["re:("]}
    with pytest.raises(WeightFileError, match=r"ignore: must be a regular expression .*, got 're:\('"):
        HFCheckpoint.open(hf_folder(layers(a_up="w4")[0], config))


def test_groups_that_agree_on_a_layer_may_both_name_it(hf_folder: Write) -> None:
    tensors, values = layers(a_up="w4")
    groups = {"one": {"targets": ["re:a.*"], "weights": W4}, "two": {"targets": ["re:.*up"], "weights": W4}}
    folder = hf_folder(tensors, {**mixed(groups), "format": "pack-quantized"})
    assert_tensor_is(HFCheckpoint.open(folder).tensors["a.up.weight"], values["a.up"])
    groups["two"]["weights"] = W8
    with pytest.raises(
        UnsupportedModelError, match=r"tensor 'a\.up\.weight_packed': several groups .* name a\.up, and they"
    ):
        HFCheckpoint.open(hf_folder(tensors, {**mixed(groups), "format": "pack-quantized"}))


@pytest.mark.parametrize("ignore", [["a.up"], ["re:.*up$"]])
def test_a_quantized_layer_that_the_config_ignores_is_refused(hf_folder: Write, ignore: list[str]) -> None:
    tensors, _ = layers(a_up="w4")
    config = {**quantization("pack-quantized", W4), "ignore": ignore}
    with pytest.raises(
        WeightFileError, match=r"'a\.up\.weight_packed': must be plain floats, as .*\.ignore names a\.up"
    ):
        HFCheckpoint.open(hf_folder(tensors, config))


def test_a_quantized_layer_that_no_group_names_is_refused(hf_folder: Write) -> None:
    tensors, _ = layers(a_up="w4")
    groups = {"one": {"targets": ["re:b.*"], "weights": W4, "format": "pack-quantized"}}
    with pytest.raises(WeightFileError, match=r"'a\.up\.weight_packed': no group of .*config_groups names a\.up"):
        HFCheckpoint.open(hf_folder(tensors, mixed(groups)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: scales of the KV cache are not implemented"),
        ({"transform_config": {"config_groups": {}}}, "transform_config: transformed activations are not implemented"),
        (
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config.format: is not implemented; .* dense, got",
        ),
        ({"format": "marlin-24"}, "format: is not implemented; those that are: pack-quantized, int-quantized, float"),
        ({"format": "nvfp4-pack-quantized"}, "format: is not implemented"),
        ({"config_groups": {}}, "config_groups: must name at least one group of layers"),
        ({"ignore": ["re:(a+)+$"]}, r"ignore: an expression may have .*, got 're:\(a\+\)\+\$'"),
        ({"ignore": ["re:.*.*.*.*.*x"]}, "ignore: an expression may have 512 characters, 3 repeats"),
        ({"ignore": ["re:" + "a?" * 30]}, "ignore: an expression may have 512 characters, 3 repeats"),
        ({"ignore": ["re:" + "(a|a)" * 30]}, "and 8 alternatives"),
        ({"ignore": ["re:[[a]"]}, "ignore: sets of sets"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(hf_folder: Write, change: dict, message: str) -> None:
    config = {**quantization("pack-quantized", W4), **change}
    with pytest.raises(UnsupportedModelError, match=message):
        HFCheckpoint.open(hf_folder(layers(a_up="w4")[0], config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 3}, "num_bits: is not implemented for int weights; those that are: 2, 4, 8, got 3"),
        ({"strategy": "tensor_group"}, "strategy: is not implemented"),
        ({"dynamic": True}, "dynamic: weights with scales of the moment"),
    ],
)
def test_weights_that_are_not_implemented_are_refused_by_name(hf_folder: Write, change: dict, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        HFCheckpoint.open(hf_folder(layers(a_up="w4")[0], quantization("pack-quantized", {**W4, **change})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.weight_scale": None}, r"tensor 'x\.weight_scale': is missing"),
        ({"x.weight_shape": None}, r"tensor 'x\.weight_shape': is missing"),
        ({"x.weight_shape": np.array([N, K + 8])}, r"'x\.weight_packed' shape: must be \[48, 9\], got \(48, 8\)"),
        (
            {"x.weight_shape": np.array([N, -8])},
            r"'x\.weight_shape' value: must be rows and columns, .*, got \(48, -8\)",
        ),
        ({"x.weight_shape": np.array([N])}, r"'x\.weight_shape' shape: must be \[2\], got \(1,\)"),
        ({"x.weight_shape": np.array([N, 60])}, r"'x\.weight_packed' shape: must have a multiple of 16 inputs, not 60"),
        ({"x.weight_scale": np.ones((N, 3), np.float16)}, r"'x\.weight_scale' shape: must be \[48, 4\], got \(48, 3\)"),
        ({"x.weight_zero_point": np.ones((5, 4), np.int32)}, r"'x\.weight_zero_point' shape: must be \[6, 4\]"),
        ({"x.weight_g_idx": np.arange(K, dtype=np.int32)}, r"'x\.weight_g_idx' value: .* in \[0, 3\], got 63"),
    ],
)
def test_parts_that_do_not_fit_are_refused(hf_folder: Write, change: dict, message: str) -> None:
    parts, _ = written("pack-quantized", W4, (N, K), torch.float16)
    kept = {name: part for name, part in {**parts, **change}.items() if part is not None}
    with pytest.raises(WeightFileError, match=message) as caught:
        HFCheckpoint.open(hf_folder(kept, quantization("pack-quantized", W4)))
    assert re.search(r"model\.safetensors: tensor 'x\.", caught.value.field)
