"""Every family computes what `transformers` computes: small random models, through files, chunks and pages."""

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `oracle`: torch")
transformers = pytest.importorskip("transformers", reason="needs the extra `oracle`: transformers")

Q = gguf.GGMLQuantizationType
VOCAB = 203
LENGTHS = (45, 22, 9)  # of three sequences that run together
ATTENTION_SOFTCAP = 1.5
TOKENS = 80  # of a step: all of them at once and padding
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
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


def build(family: str) -> Any:
    """The model, with norms and biases as random as its matrices."""
    torch.manual_seed(11)
    model = FAMILIES[family][0]().eval()
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
    settings = {} if softcap is None else {"softcap": softcap}
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


def in_decode_steps(work: Any) -> list[list[Any]]:
    """Three prompts, then three rows that decode."""
    prompts = [work(i, length - 8) for i, length in enumerate(LENGTHS)]
    return [prompts] + [[work(i, 1, decode=True) for i in (2, 0, 1)] for _ in range(8)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_however_the_tokens_are_cut(family, recipe, save, paged, work):
    model = build(family)
    ids = sequences()
    runner = paged(save(model, recipe(**FAMILIES[family][1])))
    wanted = reference(model, ids)
    assert np.std(np.concatenate(wanted)) > 0.5, "logits that are all alike would prove nothing"
    for plan in (at_once(work), in_pieces(work)):
        runner.reset()
        for got, want in zip(runner.run(ids, plan, tokens=TOKENS), wanted, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-4)


def test_the_softcaps_bite():
    model, ids = build("gemma 3, softcaps"), sequences()
    capped = reference(model, ids)[0]
    model.config.attn_logit_softcapping = None
    assert np.abs(capped - reference(model, ids)[0]).max() > 0.1


@pytest.mark.parametrize("family", ["llama 3", "gemma 3"])
def test_a_program_that_only_decodes(family, recipe, save, paged, work):
    model, ids = build(family), sequences()
    got = paged(save(model, recipe(**FAMILIES[family][1]))).run(ids, in_decode_steps(work), tokens=TOKENS)
    for mine, want in zip(got, reference(model, ids), strict=True):
        np.testing.assert_allclose(mine, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma 3"])
def test_the_windows_of_these_models_bite(family):
    """The parity above would hold for a model whose windows do nothing, if they did nothing in the reference."""
    model, ids = build(family), sequences()
    narrow = reference(model, ids)
    torch.manual_seed(11)
    changed = {"mistral": lambda: wide_mistral(), "gemma 3": lambda: gemma(sliding_window=200)}[family]().eval()
    changed.load_state_dict(model.state_dict())
    assert np.abs(narrow[0][20:] - reference(changed, ids)[0][20:]).max() > 0.1


def wide_mistral() -> Any:
    config = transformers.MistralConfig(**COMMON, num_key_value_heads=2, head_dim=32, sliding_window=None)
    return transformers.MistralForCausalLM(config)


# That every type and every mix keeps its values is for tests/loading/test_weights.py to show.
MIXES = {
    "Q4_1": lambda name: Q.Q4_1,
    "K types over layers and inside qkv": lambda name: (
        Q.Q6_K
        if "attn_v" in name or "token_embd" in name
        else Q.Q8_0
        if "attn_k" in name
        else Q.Q5_K
        if "blk.1." in name
        else Q.Q4_K
    ),
}


def wide_llama() -> Any:
    """Wide enough for K types, whose blocks have 256 elements."""
    torch.manual_seed(11)
    return llama(hidden_size=256, intermediate_size=256, num_key_value_heads=2, initializer_range=0.06).eval()


@pytest.mark.parametrize("layout", ["rows", "planar"])
@pytest.mark.parametrize("mix", MIXES)
def test_a_quantized_file_gives_the_logits_of_its_exact_weights(mix, layout, recipe, save, paged, work):
    model = wide_llama()
    path = save(model, recipe(arch="llama", types=MIXES[mix]))
    ids = sequences()
    got = paged(path, layout=layout).run(ids, at_once(work), tokens=TOKENS)
    for mine, want in zip(got, reference(model, ids), strict=True):
        np.testing.assert_allclose(mine, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["rows", "planar"])
def test_bfloat16_operands_stay_near(layout, recipe, save, paged, work):
    """Bound: 16 products in a row, each with two operands rounded by up to 2^-9, of logits that spread by about 1."""
    model = wide_llama()
    path = save(model, recipe(arch="llama", types=MIXES["Q4_1"]))
    ids = sequences()
    got = np.concatenate(paged(path, layout=layout, operands="bfloat16").run(ids, at_once(work), tokens=TOKENS))
    want = np.concatenate(reference(model, ids))
    error = np.abs(got - want).max() / want.std()
    assert 1e-4 < error < 16 * 2 * 2**-9
