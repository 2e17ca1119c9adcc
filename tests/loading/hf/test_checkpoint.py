"""Folders in HF layout: what is read of them, what is refused, and plain, AWQ, GPTQ, FP8 and BitNet weights.

Packers are written from each format's definition, element by element; values are compared bit for bit with a float64
product, which is exact. compressed-tensors has a file of its own.
"""

import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from atoma_jax.errors import ModelNotFoundError, UnsupportedModelError, WeightFileError
from atoma_jax.loading.checkpoint import Checkpoint
from atoma_jax.loading.hf.checkpoint import HFCheckpoint
from tests.loading.hf.values import assert_tensor_is, exact, opened, random_scales

Write = Callable[..., Path]
BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
N, K = 48, 64


def random_codes(bits: int, shape: tuple[int, int] = (N, K), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape)


def packed_words(codes: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """32-bit words of codes along an axis: `order[i]` is the element of a word that its i-th field holds."""
    per_word = 32 // bits
    order = tuple(range(per_word)) if order is None else order
    fields = np.moveaxis(codes.astype(np.uint64), axis, -1)
    fields = fields.reshape(*fields.shape[:-1], -1, per_word)
    words = np.zeros(fields.shape[:-1], np.uint64)
    for field, element in enumerate(order):
        words |= fields[..., element] << np.uint64(bits * field)
    return np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis)


# Folders


def test_a_folder_is_a_checkpoint_with_its_configs(hf_folder: Write) -> None:
    folder = hf_folder({"norm": np.ones(4, np.float32)}, hidden_size=4, auto_map={}, quantization_config=None)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    with HFCheckpoint.open(str(folder)) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        assert checkpoint.path == folder
        assert checkpoint.config["hidden_size"] == 4
        assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
        assert checkpoint.activation_scheme is None
        kept = checkpoint.tensors["norm"]
    assert checkpoint.tensors == {}
    np.testing.assert_array_equal(kept.dequantize(slice(None)), np.ones((1, 4), np.float32))  # stays mapped


def test_a_folder_needs_no_generation_config(hf_folder: Write) -> None:
    assert HFCheckpoint.open(hf_folder({"t": np.ones(1, np.float32)})).generation_config == {}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_plain_floats_keep_every_bit(hf_folder: Write, dtype: object) -> None:
    special = np.array([[0.0, -0.0, np.inf, -np.inf], [1e-7, 65504, -1e-5, np.nan]])
    tensors = {"m": special.astype(dtype), "v": special[0].astype(dtype), "s": np.array(1.5, dtype)}
    tensors["experts"] = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(dtype)
    checkpoint = HFCheckpoint.open(hf_folder(tensors))
    for name, flat in {"m": (2, 4), "v": (1, 4), "s": (1, 1), "experts": (6, 4)}.items():
        tensor, expected = checkpoint.tensors[name], tensors[name].astype(np.float32).reshape(flat)
        assert tensor.shape == tensors[name].shape
        assert tensor.format is None
        assert tensor.permutation is None
        assert tensor.nbytes == tensors[name].nbytes
        for rows in (slice(None), slice(1, 2), np.zeros(3, np.int64)):
            found = tensor.dequantize(rows)
            np.testing.assert_array_equal(found.view(np.uint32), expected[rows].view(np.uint32))
    assert checkpoint.tensors["m"].type_name == {"f": "F32", "e": "F16"}.get(np.dtype(dtype).char, "BF16")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.bool_, F8])
def test_a_tensor_by_itself_must_be_floats(hf_folder: Write, dtype: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"tensor 't\.weight' dtype: is no part of a weight"):
        HFCheckpoint.open(hf_folder({"t.weight": np.ones((2, 2), dtype)}))


def test_code_that_comes_with_a_model_is_refused_and_not_imported(hf_folder: Write) -> None:
    folder = hf_folder(
        {"t": np.ones(1, np.float32)},
        architectures=["LlamaForCausalLM"],
        auto_map={"AutoConfig": "code.LlamaConfig", "AutoModelForCausalLM": "evil_model.Evil"},
    )
    (folder / "evil_model.py").write_text("raise SystemExit('imported')")
    with pytest.raises(
        UnsupportedModelError, match="auto_map: code that comes with a model is never run, and trust_re"
    ):
        HFCheckpoint.open(folder)
    assert "evil_model" not in sys.modules


def test_the_code_that_an_architecture_once_came_with_is_left_alone(hf_folder: Write) -> None:
    folder = hf_folder(
        {"t": np.ones(1, np.float32)},
        architectures=["Phi3ForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
    )
    (folder / "modeling_phi3.py").write_text("raise SystemExit('imported')")
    with HFCheckpoint.open(folder) as checkpoint:
        assert list(checkpoint.tensors) == ["t"]
    assert "modeling_phi3" not in sys.modules


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "content: must be JSON in UTF-8"),
        (b"[]", "content: must be a JSON object"),
        (b"{", "content: must be JSON"),
        (b'{"a":"\xff"}', "content: must be JSON in UTF-8"),
        (b"[" * 500_000, "content: must be JSON"),
        (b'{"a":' * 200_000, "content: must be JSON"),
        (b'{"a":' + b"9" * 100_000 + b"}", "content: must be JSON"),
        (b" " * (1 << 20) + b"{}", "size: must be at most 1048576 bytes"),
        (b'{"quantization_config":[]}', "quantization_config: must be an object, got []"),
        (b'{"quantization_config":{}}', "quantization_config.quant_method: is missing, got None"),
        (b'{"quantization_config":{"quant_method":["gptq"]}}', "quant_method: must be a string, got ['gptq']"),
    ],
)
def test_a_broken_config_is_refused(hf_folder: Write, content: bytes, message: str) -> None:
    folder = hf_folder({"t": np.ones(1, np.float32)})
    (folder / "config.json").write_bytes(content)
    with pytest.raises(WeightFileError) as caught:
        HFCheckpoint.open(folder)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{folder / 'config.json'}: ")


@pytest.mark.parametrize("item", ["{}", "[]", "[[]]", '{"":{}}', "1e9"])
def test_the_largest_config_costs_less_than_50_megabytes(hf_folder: Write, item: str) -> None:
    folder = hf_folder({"t": np.ones(1, np.float32)})
    count = ((1 << 20) - 10) // (len(item) + 1)
    (folder / "config.json").write_text('{"a":[' + ",".join([item] * count) + "]}")
    tracemalloc.start()
    try:
        assert len(HFCheckpoint.open(folder).config["a"]) == count
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_a_folder_without_config_is_refused(hf_folder: Write) -> None:
    folder = hf_folder({"t": np.ones(1, np.float32)})
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match="there is no such file"):
        HFCheckpoint.open(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "gguf", "quanto", "hqq", "aqlm", "mxfp4", "torchao", "eetq"])
def test_a_method_that_is_not_implemented_is_refused_with_those_that_are(hf_folder: Write, method: str) -> None:
    folder = hf_folder({"t": np.ones(1, np.float32)}, {"quant_method": method})
    with pytest.raises(UnsupportedModelError, match=rf"awq, gptq, compressed-tensors, fp8, bitnet, .*, got '{method}'"):
        HFCheckpoint.open(folder)


# AWQ

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the eight in a word, which its i-th nibble holds


def awq_parts(group: int = 16, dtype: object = np.float16) -> tuple[dict[str, np.ndarray], np.ndarray]:
    codes, zeros = random_codes(4), random_codes(4, (N, K // group), seed=2)
    scales = random_scales(N, K // group, dtype=dtype)
    parts = {
        "x.qweight": packed_words(codes.T, 4, 1, AWQ_COLUMNS),
        "x.qzeros": packed_words(zeros.T, 4, 1, AWQ_COLUMNS),
        "x.scales": scales.T,
    }
    return parts, exact(codes, scales, zeros, np.arange(K) // group)


@pytest.mark.parametrize("group", [16, 32, -1])
@pytest.mark.parametrize("dtype", [np.float16, BF16])
def test_awq_is_exact(hf_folder: Write, group: int, dtype: object) -> None:
    size = K if group == -1 else group
    parts, values = awq_parts(size, dtype)
    folder = hf_folder(parts, {**AWQ, "group_size": group})
    nbytes = sum(part.nbytes for part in parts.values())
    facts = {"bits": 4, "group": size, "zero": 0, "scale_dtype": dtype, "min_dtype": np.float32, "nbytes": nbytes}
    assert_tensor_is(opened(folder), values, type_name="AWQ-4bit", permutation=None, **facts)


def test_awq_without_zero_points_is_symmetric(hf_folder: Write) -> None:
    parts, _ = awq_parts()
    del parts["x.qzeros"]
    values = exact(random_codes(4), parts["x.scales"].T, 8, np.arange(K) // 16)
    assert_tensor_is(opened(hf_folder(parts, {**AWQ, "zero_point": False})), values, zero=8, min_dtype=None)


def test_awq_words_are_what_its_converter_reads() -> None:
    """The packer of this file against vLLM's own reader of AutoAWQ checkpoints."""
    pytest.importorskip("compressed_tensors", reason="needs the extra `oracle`: compressed-tensors")
    torch = pytest.importorskip("torch", reason="needs the extra `oracle`: torch")
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    parts, _ = awq_parts()
    fields, _ = AutoAWQConverter.unpack_awq(torch.from_numpy(parts["x.qweight"]), None, 4)
    ordered, _ = AutoAWQConverter.reverse_awq_order(fields, None, 4)
    np.testing.assert_array_equal(ordered.numpy() & 15, random_codes(4).T)


# GPTQ

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}


def gptq_parts(
    bits: int = 4, group: int = 16, *, v2: bool = False, symmetric: bool = False, order: np.ndarray | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The parts, and the values with inputs in their own order; `order[k]` is the group of input k."""
    codes, groups = random_codes(bits), np.arange(K) // group if order is None else order
    zeros = random_codes(bits, (N, K // group), seed=2)
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = random_scales(N, K // group)
    ones = np.uint32(sum(1 << field * bits for field in range(32 // bits)))
    stored = packed_words(zeros.T, bits, 1).view(np.uint32)
    parts = {
        "x.qweight": packed_words(codes.T, bits, 0),
        "x.qzeros": (stored if v2 else stored - ones).view(np.int32),
        "x.scales": scales.T,
        "x.g_idx": groups.astype(np.int32),
    }
    return parts, exact(codes, scales, zeros, groups)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_is_exact(hf_folder: Write, bits: int, v2: bool, symmetric: bool) -> None:
    parts, values = gptq_parts(bits, v2=v2, symmetric=symmetric)
    config = {**GPTQ, "bits": bits, "sym": symmetric, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    facts = {
        "bits": bits,
        "group": 16,
        "zero": 2 ** (bits - 1) if symmetric or bits == 8 else 0,
        "scale_dtype": np.float16,
    }
    facts["min_dtype"] = None if symmetric else np.float32
    assert_tensor_is(opened(hf_folder(parts, config)), values, type_name=f"GPTQ-{bits}bit", permutation=None, **facts)


def test_gptq_stores_zero_points_less_one_in_the_nibbles_of_a_word(hf_folder: Write) -> None:
    """Without a zero point of 0 no field borrows: a plain z − 1 in each."""
    parts, _ = gptq_parts()
    zeros = 1 + random_codes(4, (N, K // 16), seed=3) % 15
    parts["x.qzeros"] = packed_words(zeros.T - 1, 4, 1)
    values = exact(random_codes(4), parts["x.scales"].T, zeros, np.arange(K) // 16)
    assert_tensor_is(opened(hf_folder(parts, GPTQ)), values)


def test_gptq_with_one_group_a_row(hf_folder: Write) -> None:
    parts, values = gptq_parts(group=K)
    assert_tensor_is(opened(hf_folder(parts, {**GPTQ, "group_size": -1})), values, group=K)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_in_the_order_of_activations_gives_inputs_in_their_own_order(hf_folder: Write, symmetric: bool) -> None:
    order = np.random.default_rng(5).permutation(np.arange(K) // 16)
    parts, values = gptq_parts(order=order, symmetric=symmetric)
    tensor = opened(hf_folder(parts, {**GPTQ, "desc_act": True, "sym": symmetric}))
    assert tensor.permutation is not None
    np.testing.assert_array_equal(tensor.permutation, np.argsort(order, kind="stable"))
    assert_tensor_is(tensor, values)


def test_gptq_needs_no_order(hf_folder: Write) -> None:
    parts, values = gptq_parts()
    del parts["x.g_idx"]
    assert_tensor_is(opened(hf_folder(parts, GPTQ)), values, permutation=None)


def test_a_symmetric_config_with_other_zero_points_is_refused_when_they_are_read(hf_folder: Write) -> None:
    tensor = opened(hf_folder(gptq_parts()[0], {**GPTQ, "sym": True}))
    with pytest.raises(WeightFileError, match=r"tensor 'x\.qweight' zero point: must be 8 in every group"):
        tensor.decode(slice(None))


def test_skipped_layers_and_biases_stay_plain(hf_folder: Write) -> None:
    parts, _ = gptq_parts()
    plain = {"head.weight": np.ones((2, 4), np.float16), "x.bias": np.ones(N, BF16)}
    checkpoint = HFCheckpoint.open(hf_folder({**parts, **plain}, {**GPTQ, "dynamic": {"-:head": {}}}))
    assert {name: tensor.type_name for name, tensor in checkpoint.tensors.items()} == {
        "head.weight": "F16",
        "x.bias": "BF16",
        "x.weight": "GPTQ-4bit",
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 3}, r"quantization_config\.bits: is not implemented; those that are: 2, 4, 8, got 3"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format: is not implemented; .* gptq, gptq_v2, got 'marlin'"),
        ({"is_marlin_format": True}, "Marlin's kernels"),
        ({"pack_dtype": "int64"}, "pack_dtype"),
        ({"dynamic": {r"+:.*down.*": {"bits": 8}}}, "a layer with settings of its own is not implemented"),
    ],
)
def test_features_of_gptq_that_are_not_implemented_are_refused(hf_folder: Write, config: dict, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        HFCheckpoint.open(hf_folder(gptq_parts()[0], {**GPTQ, **config}))


@pytest.mark.parametrize(
    ("config", "message"),
    [({"version": "gemv"}, "version: is not implemented; .*, got 'gemv'"), ({"bits": 8}, "bits: .* 4, got 8")],
)
def test_features_of_awq_that_are_not_implemented_are_refused(hf_folder: Write, config: dict, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        HFCheckpoint.open(hf_folder(awq_parts()[0], {**AWQ, **config}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.scales": None}, r"tensor 'x\.scales': is missing; the layer is quantized"),
        ({"x.qzeros": None}, r"tensor 'x\.qzeros': is missing"),
        ({"x.scales": np.ones((3, N), np.float16)}, r"tensor 'x\.scales' shape: must be \[4, 48\], got \(3, 48\)"),
        ({"x.scales": np.ones((4, N), np.int8)}, r"tensor 'x\.scales' dtype: must be F32 or F16 or BF16, got 'I8'"),
        ({"x.qzeros": np.ones((4, 5), np.int32)}, r"tensor 'x\.qzeros' shape: must be \[4, 6\], got \(4, 5\)"),
        ({"x.qweight": np.ones((8, N), np.int16)}, r"tensor 'x\.qweight' dtype: must be I32, got 'I16'"),
        ({"x.qweight": np.ones((8,), np.int32)}, r"tensor 'x\.qweight' shape: must have two dimensions"),
        (
            {"x.qweight": np.ones((0, N), np.int32)},
            r"tensor 'x\.qweight' shape: must have two dimensions, neither .* 0",
        ),
        ({"x.qweight": np.ones((7, N), np.int32)}, r"'x\.qweight' shape: must have a multiple of 16 inputs, not 56"),
        ({"x.qweight": np.ones((8, 47), np.int32)}, r"'x\.qweight' shape: must have a multiple of 8 outputs"),
        ({"x.g_idx": np.arange(K, dtype=np.int32) // 16 + 1}, r"tensor 'x\.g_idx' value: .* in \[0, 3\], got 4"),
        ({"x.g_idx": np.arange(K, dtype=np.int32) // 16 - 1}, r"tensor 'x\.g_idx' value: .* in \[0, 3\], got -1"),
        ({"x.g_idx": np.zeros(K, np.int32)}, r"tensor 'x\.g_idx' value: must have 16 inputs in each group; group 0"),
        ({"x.g_idx": np.zeros(K - 1, np.int32)}, r"tensor 'x\.g_idx' shape: must be \[64\], got \(63,\)"),
        ({"x.weight": np.ones((N, K), np.float16)}, r"'x\.qweight': is stored twice, quantized and plain"),
    ],
)
def test_parts_that_do_not_fit_are_refused(hf_folder: Write, change: dict, message: str) -> None:
    parts = {name: part for name, part in {**gptq_parts()[0], **change}.items() if part is not None}
    with pytest.raises(WeightFileError, match=message) as caught:
        HFCheckpoint.open(hf_folder(parts, GPTQ))
    assert "model.safetensors: tensor 'x." in caught.value.field


# FP8


@pytest.mark.parametrize("shape", [(N, K), (N - 7, K), (N, K - 10)])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_fp8_blocks_are_exact_also_where_the_edge_cuts_them(hf_folder: Write, shape: tuple, dtype: object) -> None:
    height, width = shape
    weight = np.random.default_rng(0).standard_normal(shape).astype(F8)
    scale = np.abs(random_scales(-(-height // 16), -(-width // 32), dtype=dtype))
    spread = scale.repeat(16, 0)[:height].repeat(32, 1)[:, :width]
    values = (weight.astype(np.float64) * spread.astype(np.float64)).astype(np.float32)
    config = {"quant_method": "fp8", "weight_block_size": [16, 32], "activation_scheme": "dynamic", "fmt": "e4m3"}
    tensor = opened(hf_folder({"x.weight": weight, "x.weight_scale_inv": scale}, config))
    assert_tensor_is(tensor, values, bits=8, float_codes=True, scale_dtype=dtype, type_name="FP8-block")


@pytest.mark.parametrize("shape", [(), (1,), (N,), (N, 1)])
def test_fp8_with_scales_of_rows_or_of_all(hf_folder: Write, shape: tuple) -> None:
    weight = np.random.default_rng(0).standard_normal((N, K)).astype(F8)
    scale = random_scales(*shape, dtype=np.float32)
    values = weight.astype(np.float32) * scale.reshape(-1, 1)
    parts = {"x.weight": weight, "x.weight_scale": scale, "x.input_scale": np.ones(1, np.float32)}
    tensor = opened(hf_folder(parts, {"quant_method": "fp8", "activation_scheme": "static"}))
    assert_tensor_is(
        tensor, values, group=K, type_name="FP8-tensor" if len(shape) < 2 and shape != (N,) else "FP8-channel"
    )


def test_fp8_damaged_to_nan_decodes_without_a_warning(hf_folder: Write) -> None:
    parts = {"x.weight": np.full((4, 8), 0x7F, np.uint8).view(F8), "x.weight_scale": np.array([np.inf], np.float32)}
    assert np.isnan(opened(hf_folder(parts, {"quant_method": "fp8"})).dequantize(slice(None))).all()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, r"tensor 'x\.weight_scale': is missing; the layer is quantized"),
        (
            {"x.weight_scale_inv": np.ones((2, 2), np.float32)},
            r"weight_scale_inv' shape: must be \[3, 2\], got \(2, 2\)",
        ),
        ({"x.weight_scale": np.ones((2,), np.float32)}, r"weight_scale' shape: must be \[\] or .*, got \(2,\)"),
    ],
)
def test_fp8_without_fitting_scales_is_refused(hf_folder: Write, parts: dict, message: str) -> None:
    config = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    with pytest.raises(WeightFileError, match=message):
        HFCheckpoint.open(hf_folder({"x.weight": np.ones((N, K), F8), **parts}, config))


@pytest.mark.parametrize("config", [{"fmt": "e5m2"}, {"scale_fmt": "ue8m0"}, {"expert_dtype": "fp4"}])
def test_features_of_fp8_that_are_not_implemented_are_refused(hf_folder: Write, config: dict) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{next(iter(config))}: is not implemented"):
        HFCheckpoint.open(hf_folder({"t": np.ones(1, np.float32)}, {"quant_method": "fp8", **config}))


# BitNet


def packed_quarters(ternary: np.ndarray) -> np.ndarray:
    """Byte row r holds rows r, r + N/4, r + N/2, r + 3N/4, each plus one, in two bits from the lowest."""
    quarters = (ternary + 1).astype(np.uint8).reshape(4, -1, ternary.shape[1])
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear", None])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_bitnet_divides_or_multiplies_as_its_config_says(
    hf_folder: Write, linear_class: str | None, dtype: object
) -> None:
    ternary = np.random.default_rng(0).integers(-1, 2, (N, K))
    scale = np.array([0.3], dtype)
    factor = np.float32(scale[0]) if linear_class == "autobitlinear" else np.float32(1) / np.float32(scale[0])
    values = ternary.astype(np.float32) * factor
    config = {"quant_method": "bitnet", "linear_class": linear_class, "modules_to_not_convert": ["head"]}
    folder = hf_folder({"x.weight": packed_quarters(ternary), "x.weight_scale": scale}, config)
    assert HFCheckpoint.open(folder).activation_scheme == "int8_token"
    scale_dtype = dtype if linear_class == "autobitlinear" else np.float32
    assert_tensor_is(opened(folder), values, bits=2, zero=1, group=K, scale_dtype=scale_dtype, type_name="BitNet")


def test_bitnet_is_packed_as_transformers_packs_it() -> None:
    torch = pytest.importorskip("torch", reason="needs the extra `oracle`: torch")
    bitnet = pytest.importorskip("transformers.integrations.bitnet", reason="needs the extra `oracle`: transformers")
    ternary = np.random.default_rng(0).integers(-1, 2, (N, K)).astype(np.int8)
    packed = bitnet.pack_weights(torch.from_numpy(ternary.copy()))
    np.testing.assert_array_equal(packed.numpy(), packed_quarters(ternary))


@pytest.mark.parametrize("config", [{"quantization_mode": "online"}, {"use_rms_norm": True}, {"linear_class": "other"}])
def test_features_of_bitnet_that_are_not_implemented_are_refused(hf_folder: Write, config: dict) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{next(iter(config))}: .* not implemented"):
        HFCheckpoint.open(hf_folder({"t": np.ones(1, np.float32)}, {"quant_method": "bitnet", **config}))


def test_bitnet_without_scale_is_refused(hf_folder: Write) -> None:
    with pytest.raises(WeightFileError, match=r"tensor 'x\.weight_scale': is missing"):
        HFCheckpoint.open(hf_folder({"x.weight": np.ones((4, 8), np.uint8)}, {"quant_method": "bitnet"}))


# Many layers


def test_experts_are_just_more_names(hf_folder: Write) -> None:
    parts, values = gptq_parts()
    names = [f"model.layers.0.mlp.experts.{expert}.w1" for expert in range(3)]
    tensors = {f"{name}.{part.removeprefix('x.')}": value for name in names for part, value in parts.items()}
    checkpoint = HFCheckpoint.open(hf_folder(tensors, GPTQ))
    assert set(checkpoint.tensors) == {f"{name}.weight" for name in names}
    for name, tensor in checkpoint.tensors.items():
        assert tensor.name == name
        assert_tensor_is(tensor, values)


def test_parts_of_a_layer_may_lie_in_several_shards(tmp_path: Path) -> None:
    import safetensors.numpy

    parts, values = gptq_parts()
    files = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(parts)}
    for file in set(files.values()):
        held = {name: np.ascontiguousarray(parts[name]) for name in parts if files[name] == file}
        safetensors.numpy.save_file(held, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": GPTQ}))
    assert_tensor_is(opened(tmp_path), values)
