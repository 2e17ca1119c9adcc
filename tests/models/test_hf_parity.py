"""Every architecture computes what `transformers` computes from the same folder: config.json and safetensors."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from atoma_jax import ops
from atoma_jax.loading.hf.spec import ARCHITECTURES, read_hf_spec
from atoma_jax.loading.json_file import Section
from atoma_jax.models.mixture import MixtureLayer
from tests.models.families import (
    COMMON,
    EXPERTS,
    FAMILIES,
    SERVED,
    TOKENS,
    at_once,
    gemma,
    gemma2,
    in_pieces,
    mixtral,
    qwen2_moe,
    qwen3_moe,
    randomized,
    reference,
    sequences,
    torch,
    transformers,
)


def windowed(name: str, **changes: Any) -> Any:
    """A Qwen whose second layer has a window."""
    settings = {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1, **changes}
    config = getattr(transformers, f"{name}Config")(**COMMON, num_key_value_heads=2, **settings)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def bitnet() -> Any:
    return transformers.BitNetForCausalLM(
        transformers.BitNetConfig(**{**COMMON, "initializer_range": 0.3}, num_key_value_heads=2)
    )


# Those that no GGUF file holds, or none with these settings.
MODELS: dict[str, Callable[[], Any]] = {name: make for name, (make, _) in FAMILIES.items()} | {
    "qwen2, windows": lambda: windowed("Qwen2"),
    "qwen3, windows": lambda: windowed("Qwen3", head_dim=24),
    "qwen2 moe, windows": lambda: qwen2_moe(use_sliding_window=True, sliding_window=10, norm_topk_prob=True),
    "qwen3 moe, windows": lambda: qwen3_moe(use_sliding_window=True, sliding_window=10, norm_topk_prob=False),
    "gemma 2, scale of its own": lambda: gemma2(query_pre_attn_scalar=24),
    "gemma 3, linear scaling": lambda: gemma(
        query_pre_attn_scalar=24,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "bitnet, dense": bitnet,
}


def built(name: str) -> Any:
    """A model of numbers that bfloat16 holds, so that files of any type hold them."""
    model = randomized(MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model


def saved(model: Any, folder: Path, dtype: Any = torch.bfloat16) -> Path:
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    return folder


def assert_logits_are(got: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for mine, want in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine, want, atol=2e-4, rtol=1e-4)


def test_every_architecture_is_among_these_models() -> None:
    assert {type(make()).__name__ for make in MODELS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_however_the_tokens_are_cut(name, tmp_path, paged, work):
    model, ids = built(name), sequences()
    runner = paged(saved(model, tmp_path), max_model_len=SERVED.get(name))
    wanted = reference(model, ids)
    assert np.std(np.concatenate(wanted)) > 0.5, "logits that are all alike would prove nothing"
    for plan in (at_once(work), in_pieces(work)):
        runner.reset()
        assert_logits_are(runner.run(ids, plan, tokens=TOKENS), wanted)


@pytest.mark.parametrize("name", ["qwen2, windows", "qwen3, windows", "qwen2 moe, windows", "qwen3 moe, windows"])
def test_the_windows_of_these_models_bite(name):
    model, ids = built(name), sequences()
    narrow = reference(model, ids)[0]
    wide = copy.deepcopy(model.config)
    wide.sliding_window = 200
    other = type(model)(wide).eval()
    other.load_state_dict(model.state_dict())
    assert np.abs(narrow[20:] - reference(other, ids)[0][20:]).max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files_of_other_types_hold_the_same_model(dtype, tmp_path, paged, work):
    model, ids = built("llama 3"), sequences()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype).float())
    got = paged(saved(model, tmp_path, dtype)).run(ids, at_once(work), tokens=TOKENS)
    assert_logits_are(got, reference(model, ids))


def test_a_config_of_an_older_version_describes_the_same_model(tmp_path, paged, work):
    """`rope_theta` and `rope_scaling`, as in the files of Llama 3.1, and defaults left out."""
    model, ids = built("llama 3.1"), sequences()
    path = saved(model, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act"):
        del config[key]
    path.write_text(json.dumps(config))
    assert_logits_are(paged(tmp_path).run(ids, at_once(work), tokens=TOKENS), reference(model, ids))


@pytest.mark.parametrize("name", ["mixtral", "qwen2 moe"])
def test_experts_may_be_stored_as_one_tensor(name, tmp_path, paged, work):
    """As transformers 5 keeps them, and writes them where it is asked to."""
    model, ids = built(name), sequences()
    model.save_pretrained(tmp_path, save_original_format=False)
    got = paged(tmp_path).run(ids, at_once(work), tokens=TOKENS)
    assert_logits_are(got, reference(model, ids))


# Routers


def routed(layer: Any, x: np.ndarray, router: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    layer.router.set_value(jnp.asarray(router))
    experts, weights = layer.route(jnp.asarray(x))
    return np.asarray(experts), np.asarray(weights)


@pytest.mark.parametrize("name", ["mixtral", "qwen2 moe", "qwen3 moe", "qwen3 moe, windows"])
def test_a_token_goes_to_the_experts_that_transformers_chooses(name, tmp_path, paged):
    model = built(name)
    router = next(module for module in model.modules() if "TopKRouter" in type(module).__name__)
    spec = paged(saved(model, tmp_path)).spec
    layer = MixtureLayer(spec, ops.Backend(platform="cpu", operands="float32", weight_layout="rows"))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, spec.dim)).astype(np.float32)
    with torch.no_grad():
        _, want_weights, want_experts = router(torch.from_numpy(x))
    experts, weights = routed(layer, x, router.weight.detach().numpy())
    np.testing.assert_array_equal(experts, want_experts.numpy())
    np.testing.assert_allclose(weights, want_weights.numpy(), rtol=2e-6)
    assert spec.experts.normalized == bool(np.allclose(weights.sum(axis=1), 1))


def test_nearly_tied_experts_are_chosen_by_float32_logits():
    """Logits lie so close that products of bfloat16 or TF32 operands would choose others."""
    D, k = COMMON["hidden_size"], 2
    config = {**mixtral().config.to_dict(), "architectures": ["MixtralForCausalLM"]}
    layer = MixtureLayer(
        read_hf_spec(Section("config", config)),
        ops.Backend(platform="cpu", operands="bfloat16", weight_layout="rows"),
    )
    rng = np.random.default_rng(1)
    apart = np.float32(2e-4) * rng.standard_normal((EXPERTS, D)).astype(np.float32)
    router = rng.standard_normal(D).astype(np.float32) + apart
    x = rng.standard_normal((300, D)).astype(np.float32)
    exact = x.astype(np.float64) @ router.T.astype(np.float64)
    order = np.argsort(-exact, axis=1)
    gaps = -np.diff(np.take_along_axis(exact, order, axis=1)[:, : k + 1])
    clear = gaps.min(axis=1) > 2e-5  # twice what float32 sums of 64 products may be off
    assert clear.sum() > 200
    assert np.median(gaps) < 2e-3, "2^-8 of a logit"
    experts, _ = routed(layer, x, router)
    np.testing.assert_array_equal(experts[clear], order[clear, :k])
