"""A damaged model file is an error that a user can read, as far as its shape and the places of its weights."""

import random
from pathlib import Path

import pytest

from atoma_jax.errors import ModelNotFoundError, UnsupportedModelError, WeightFileError
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.model_files import open_model
from atoma_jax.models.decoder import Decoder
from atoma_jax.models.params import specs_of
from atoma_jax.ops import Backend
from tests.loading.gguf.fuzz import mutate

BACKEND = Backend(platform="cpu", operands="float32", weight_layout="planar")
EXPECTED = (WeightFileError, UnsupportedModelError, ModelNotFoundError)
EXPERTS = {f"blk.{i}.ffn_{name}_exps.weight": shape for i in range(2) for name, shape in (
    ("gate", (4, 64, 256)), ("up", (4, 64, 256)), ("down", (4, 256, 64)))}  # fmt: skip
EXPERTS |= {f"blk.{i}.ffn_gate_inp.weight": (4, 256) for i in range(2)}
EXPERTS |= {f"blk.{i}.ffn_{name}.weight": None for i in range(2) for name in ("gate", "up", "down")}


def reads(path: Path) -> bool:
    """Whether the model has a shape and all its weights have places."""
    try:
        with open_model(resolve(str(path))) as files:
            files.sources(specs_of(Decoder(files.spec, BACKEND)))
    except EXPECTED:
        return False
    return True


@pytest.mark.parametrize("kind", ["llama", "mixture", "gemma"])
def test_mutated_files_are_refused_or_read(tmp_path, tiny_model, kind):
    changes = {
        "llama": {"metadata": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}},
        "mixture": {
            "arch": "qwen3moe",
            "metadata": {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64},
            "tensors": EXPERTS,
        },
        "gemma": {"arch": "gemma2", "tensors": {
            f"blk.{i}.post_{name}_norm.weight": (256,) for i in range(2) for name in ("attention", "ffw")}},
    }[kind]  # fmt: skip
    path = tmp_path / "model.gguf"
    tiny_model(**changes).write(path)
    assert reads(path), "the file as it was written"
    original = path.read_bytes()
    header = original.index(b"output_norm.weight") + 64
    loaded = 0
    for seed in range(400):
        data = bytearray(original)
        mutate(data, random.Random(seed), header)
        path.write_bytes(data)
        loaded += reads(path)
    assert 0 < loaded < 400


@pytest.mark.parametrize(
    ("arch", "metadata", "tensors"),
    [
        ("llama", {"rope.scaling.type": "yarn", "rope.freq_base": 1.0}, {}),
        ("gemma2", {"block_count": 46, "attention.head_count": 1024, "attention.key_length": 64}, {}),
        ("llama", {}, {"token_embd.weight": (40,)}),
        ("qwen3moe", {}, {}),
        ("qwen3moe", {"block_count": 1024, "expert_count": 4096, "expert_used_count": 1}, {}),
    ],
)
def test_headers_that_promise_what_cannot_be(tmp_path, tiny_model, arch, metadata, tensors):
    tiny_model(arch=arch, metadata=metadata, tensors=tensors).write(tmp_path / "model.gguf")
    assert not reads(tmp_path / "model.gguf")
