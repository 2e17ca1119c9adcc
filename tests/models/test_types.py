"""Every tensor type of GGUF files, from the file to logits: those of `transformers` on the values in the file.

Q2_0 is left out: no writer knows it yet. Its decoding is tested in `tests/quant`, its kernels are TQ2_0's.
"""

import gguf
import numpy as np
import pytest

from atoma_jax.quant.ggml import FLOAT_TYPES, SUPPORTED_TYPES
from atoma_jax.quant.ggml_types import GGMLType as T

torch = pytest.importorskip("torch", reason="needs the extra `oracle`: torch")
transformers = pytest.importorskip("transformers", reason="needs the extra `oracle`: transformers")

VOCAB, LENGTHS, TOKENS = 64, (24, 9), 36
TYPES = sorted(SUPPORTED_TYPES - {T.Q2_0})


def narrow_llama():
    """One layer, wide enough for blocks of 256."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.06,
    )
    return transformers.LlamaForCausalLM(config).eval()


def logprobs(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# Packed, each type compiles a program of its own: one of each kind always, the others where there is time.
PACKED = {T.Q4_0, T.Q8_0, T.Q2_K, T.Q4_K, T.IQ2_XS, T.IQ4_NL, T.TQ2_0, T.MXFP4}
CASES = [pytest.param(kind, "rows", id=f"{kind.name}-rows") for kind in TYPES] + [
    pytest.param(kind, "planar", id=f"{kind.name}-planar", marks=() if kind in PACKED else pytest.mark.slow)
    for kind in TYPES
    if kind not in FLOAT_TYPES
]
NATIVE_FLOATS = {T.F32: "float32", T.F16: "float16", T.BF16: "bfloat16"}  # as native kernels read them
CASES += [pytest.param(kind, "tiles", id=f"{kind.name}-tiles") for kind in NATIVE_FLOATS]


@pytest.mark.parametrize(("ggml_type", "layout"), CASES)
def test_logits_are_those_of_the_values_in_the_file(ggml_type, layout, recipe, save, paged, work):
    model = narrow_llama()
    kind = gguf.GGMLQuantizationType(ggml_type)
    runner = paged(save(model, recipe(arch="llama", types=lambda name: kind)), layout=layout)
    if layout == "tiles":
        assert {str(runner.weight(name).dtype) for name in ("embed", "layers.qkv")} == {NATIVE_FLOATS[ggml_type]}
    rng = np.random.default_rng(3)
    ids = [rng.integers(0, VOCAB, length).astype(np.int32) for length in LENGTHS]
    got = runner.run(ids, [[work(i, length) for i, length in enumerate(LENGTHS)]], tokens=TOKENS)
    for mine, one in zip(got, ids, strict=True):
        with torch.no_grad():
            want = model(torch.from_numpy(one[None].astype(np.int64))).logits[0].numpy()
        assert want.std() > 0.05, "logits that are all alike would prove nothing"
        np.testing.assert_allclose(logprobs(mine), logprobs(want), atol=1e-3, rtol=0)
