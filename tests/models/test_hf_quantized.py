"""A quantized folder gives the logits of `transformers` with its exact weights, whatever the format."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.loading.hf.test_checkpoint import AWQ_COLUMNS, packed_quarters, packed_words
from tests.models.families import (
    COMMON,
    TOKENS,
    at_once,
    llama,
    qwen3_moe,
    randomized,
    reference,
    sequences,
    torch,
    transformers,
)

Parts = dict[str, np.ndarray]
BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
GROUP = 32
BLOCK = (16, 32)


def codes_of(weight: np.ndarray, group: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Four-bit codes, f16 scales and zero points that come near a weight; groups of neighbours."""
    grouped = weight.reshape(len(weight), -1, group)
    scales = (np.abs(grouped).max(axis=2) / 6).astype(np.float16)
    zeros = rng.integers(6, 10, scales.shape)
    codes = np.clip(np.round(grouped / scales[..., None].astype(np.float32)) + zeros[..., None], 0, 15).astype(np.int64)
    return codes.reshape(weight.shape), scales, zeros


def values_of(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | float, groups: np.ndarray) -> np.ndarray:
    shifted = codes - (zeros[:, groups] if isinstance(zeros, np.ndarray) else zeros)
    return (shifted * scales.astype(np.float64)[:, groups]).astype(np.float32)


def awq(weight: np.ndarray, rng: np.random.Generator) -> tuple[Parts, np.ndarray]:
    codes, scales, zeros = codes_of(weight, GROUP, rng)
    parts = {
        "qweight": packed_words(codes.T, 4, 1, AWQ_COLUMNS),
        "qzeros": packed_words(zeros.T, 4, 1, AWQ_COLUMNS),
        "scales": scales.T,
    }
    return parts, values_of(codes, scales, zeros, np.arange(weight.shape[1]) // GROUP)


def gptq(weight: np.ndarray, rng: np.random.Generator) -> tuple[Parts, np.ndarray]:
    """In an order of activations, another one for each width, so that q, k and v have the same."""
    K = weight.shape[1]
    groups = np.random.default_rng(K).permutation(np.arange(K) // GROUP)
    order = np.argsort(groups, kind="stable")
    sorted_codes, scales, zeros = codes_of(weight[:, order], GROUP, rng)
    codes = np.empty_like(sorted_codes)
    codes[:, order] = sorted_codes
    parts = {
        "qweight": packed_words(codes.T, 4, 0),
        "qzeros": packed_words(zeros.T - 1, 4, 1),
        "scales": scales.T,
        "g_idx": groups.astype(np.int32),
    }
    return parts, values_of(codes, scales, zeros, groups)


def packed_quantized(weight: np.ndarray, rng: np.random.Generator) -> tuple[Parts, np.ndarray]:
    codes, scales, _ = codes_of(weight, GROUP, rng)
    parts = {
        "weight_packed": packed_words(codes, 4, 1),
        "weight_scale": scales.astype(BF16),
        "weight_shape": np.asarray(weight.shape, np.int64),
    }
    return parts, values_of(codes, scales.astype(BF16), 8, np.arange(weight.shape[1]) // GROUP)


def fp8(weight: np.ndarray, rng: np.random.Generator) -> tuple[Parts, np.ndarray]:
    N, K = weight.shape
    scale = rng.uniform(0.001, 0.01, (-(-N // BLOCK[0]), -(-K // BLOCK[1]))).astype(np.float32)
    spread = scale.repeat(BLOCK[0], 0)[:N].repeat(BLOCK[1], 1)[:, :K]
    codes = np.clip(weight / spread, -448, 448).astype(F8)  # beyond it is NaN
    return {"weight": codes, "weight_scale_inv": scale}, codes.astype(np.float32) * spread


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
        }
    },
}
FORMATS: dict[str, tuple[Callable[[np.ndarray, np.random.Generator], tuple[Parts, np.ndarray]], dict[str, Any]]] = {
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "GPTQ": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False}),
    "compressed-tensors": (packed_quantized, COMPRESSED),
    "FP8 blocks": (fp8, {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}),
}


def quantized_folder(model: Any, folder: Path, how: str) -> Path:
    """Writes the folder with all projections of all layers quantized; the model gets their exact values."""
    quantize, config = FORMATS[how]
    rng = np.random.default_rng(2)
    model.save_pretrained(folder)
    tensors: Parts = {}
    for name, tensor in safetensors.numpy.load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") or name == module:
            tensors[name] = tensor
            continue
        parts, values = quantize(tensor, rng)
        tensors |= {f"{module}.{part}": np.ascontiguousarray(array) for part, array in parts.items()}
        exact_weight(model, name).copy_(torch.from_numpy(values))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    add_to_config(folder, quantization_config=config)
    return folder


def exact_weight(model: Any, name: str) -> Any:
    """The place of a tensor of a file in the model, which fuses the projections of experts."""
    if ".experts." not in name:
        return model.get_parameter(name).detach()
    prefix, _, rest = name.partition(".experts.")
    expert, projection, _ = rest.split(".")
    experts = model.get_submodule(f"{prefix}.experts")
    if projection == "down_proj":
        return experts.down_proj.detach()[int(expert)]
    return experts.gate_up_proj.detach()[int(expert)].chunk(2)[projection == "up_proj"]


def add_to_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def wide_llama() -> Any:
    return llama(num_key_value_heads=2, intermediate_size=128)


@pytest.mark.parametrize(("how", "layout"), [(how, "rows") for how in FORMATS] + [("GPTQ", "planar")])
def test_the_logits_are_those_of_the_exact_weights(how, layout, tmp_path, paged, work):
    model, ids = randomized(wide_llama), sequences()
    before = reference(model, ids)
    folder = quantized_folder(model, tmp_path, how)
    wanted = reference(model, ids)
    assert np.abs(np.concatenate(before) - np.concatenate(wanted)).max() > 0.1, "nothing was quantized"
    got = paged(folder, layout=layout).run(ids, at_once(work), tokens=TOKENS)
    for mine, want in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["AWQ", "FP8 blocks"])
def test_the_experts_of_a_mixture_may_be_quantized(how, tmp_path, paged, work):
    model, ids = randomized(lambda: qwen3_moe(head_dim=16)), sequences()
    folder = quantized_folder(model, tmp_path, how)
    got = paged(folder).run(ids, at_once(work), tokens=TOKENS)
    for mine, want in zip(got, reference(model, ids), strict=True):
        np.testing.assert_allclose(mine, want, atol=2e-4, rtol=1e-4)


# Ternary weights with inputs of eight bits


def ternary_folder(model: Any, folder: Path, linear_class: str) -> Path:
    """Writes the folder as `transformers` packs it; the model gets layers that do what its kernels do, in float32."""
    model.save_pretrained(folder)
    tensors: Parts = {}
    for name, tensor in safetensors.numpy.load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = tensor
            continue
        mean = np.abs(tensor).mean()
        codes = np.clip(np.round(tensor / mean), -1, 1)
        stored = np.asarray([1 / mean if linear_class == "bitlinear" else mean], np.float32).astype(BF16)
        tensors[name], tensors[f"{module}.weight_scale"] = packed_quarters(codes), stored
        factor = np.float32(stored[0])
        exact = codes / factor if linear_class == "bitlinear" else codes * factor
        model.get_parameter(name).detach().copy_(torch.from_numpy(exact.astype(np.float32)))
        model.get_submodule(module).register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    add_to_config(folder, quantization_config={"quant_method": "bitnet", "linear_class": linear_class})
    return folder


def rounded(x: Any) -> Any:
    """Each token as int8, widened again (arXiv:2402.17764; `activation_quant` of transformers)."""
    scale = 127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    return (x * scale).round().clamp(-128, 127) / scale


def bitnet() -> Any:
    config = {**COMMON, "intermediate_size": 128, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return transformers.BitNetForCausalLM(transformers.BitNetConfig(**config))


@pytest.mark.optimized  # the order of sums decides which halves are met
@pytest.mark.parametrize(
    ("make", "linear_class"), [(bitnet, "autobitlinear"), (wide_llama, "bitlinear")], ids=["BitNet", "ternary llama"]
)
def test_ternary_models_round_their_inputs(make, linear_class, tmp_path, paged, work):
    """An input that float32 sums put on the other side of a half is off by 1/127 of its largest: it befalls few."""
    model, ids = randomized(make), sequences()
    unrounded = copy.deepcopy(model)
    runner = paged(ternary_folder(model, tmp_path, linear_class))
    assert runner.spec.int8_activations
    assert runner.spec.sub_norms == (make is bitnet)
    got = np.concatenate(runner.run(ids, at_once(work), tokens=TOKENS))
    error = np.abs(got - np.concatenate(reference(model, ids)))
    assert np.quantile(error, 0.9) < 2e-5
    assert error.max() < 0.05
    unrounded.load_state_dict(model.state_dict())
    assert np.median(np.abs(got - np.concatenate(reference(unrounded, ids)))) > 1e-3, "rounding changes every logit"
