"""Every family computes what `transformers` computes: small random models, through GGUF files, chunks and pages."""

from typing import Any

import gguf
import numpy as np
import pytest

from tests.models.families import (
    COMMON,
    FAMILIES,
    LENGTHS,
    SERVED,
    TOKENS,
    at_once,
    build,
    gemma,
    gemma2,
    in_pieces,
    llama,
    phi3,
    reference,
    sequences,
    torch,
    transformers,
)

Q = gguf.GGMLQuantizationType


def in_decode_steps(work: Any) -> list[list[Any]]:
    """Three prompts, then three rows that decode."""
    prompts = [work(i, length - 8) for i, length in enumerate(LENGTHS)]
    return [prompts] + [[work(i, 1, decode=True) for i in (2, 0, 1)] for _ in range(8)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_however_the_tokens_are_cut(family, recipe, save, paged, work):
    model = build(family)
    ids = sequences()
    runner = paged(save(model, recipe(**FAMILIES[family][1])), max_model_len=SERVED.get(family))
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


@pytest.mark.parametrize("family", ["mistral", "phi 3", "gemma 2", "gemma 3"])
def test_the_windows_of_these_models_bite(family):
    """The parity above would hold for a model whose windows do nothing, if they did nothing in the reference."""
    model, ids = build(family), sequences()
    narrow = reference(model, ids)
    torch.manual_seed(11)
    wide = {
        "mistral": lambda: wide_mistral(),
        "phi 3": lambda: phi3(),
        "gemma 2": lambda: gemma2(sliding_window=200),
        "gemma 3": lambda: gemma(sliding_window=200),
    }
    changed = wide[family]().eval()
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


@pytest.mark.parametrize("layout", ["rows", "planar", "tiles"])
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
