"""A random model has the shape and the types that were asked for, and the tokenizer that it borrowed."""

from pathlib import Path

import pytest

from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.gguf.file import GGUFFile
from atoma_jax.loading.model_files import open_model
from bench import random_gguf


@pytest.mark.slow  # for gguf's own reader of a vocabulary
@pytest.mark.model
def test_a_model_of_the_shape_that_was_asked_for(smollm2_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    random_gguf.main(path, "Q4_K", str(smollm2_path), layers=2, dim=256, ffn=512, heads=4, kv_heads=2)
    with open_model(resolve(str(path)), max_model_len=None) as files:
        spec = files.spec
        assert (spec.num_layers, spec.dim, spec.ffn_dim, spec.num_heads, spec.num_kv_heads) == (2, 256, 512, 4, 2)
        assert spec.tied_embeddings
    with GGUFFile.open(path) as file, GGUFFile.open(smollm2_path) as lender:
        assert file.metadata["tokenizer.ggml.tokens"] == lender.metadata["tokenizer.ggml.tokens"]
        down = file.tensors["blk.1.ffn_down.weight"]
        assert down.type_name == "Q4_K"
        assert 0.9 < down.dequantize(slice(0, 64)).std() * 512**0.5 < 1.1
