"""The ternary test model through this engine: one set of logits, from every file and layout, alone and batched.

`test_bitnet_reference.py` shows that the reference is `transformers`; here the engine's kernels and readers follow.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from bench.ternary import export
from tests.models.bitnet_reference import EDGE, BitNetReference

DATA = Path(__file__).parents[1] / "data" / "ternary"
TOKENS = 48
# On texts where no activation is near a rounding edge, what is left is float32 against float64.
CLOSE = 1e-4


def settled_ids(count: int) -> list[np.ndarray]:
    """Token ids of the first texts without edges."""
    tokenizer = Tokenizer.from_file(str(DATA / "hf" / "tokenizer.json"))
    cases = json.loads((DATA / "settled.json").read_text())[:count]
    return [np.asarray(tokenizer.encode(case["text"]).ids, np.int32) for case in cases]


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    reference = BitNetReference(DATA / "hf")
    traces = [reference.forward(ids) for ids in settled_ids(3)]
    assert min(trace.edge[-1] for trace in traces) > EDGE
    return [trace.logits for trace in traces]


@pytest.fixture
def model_file(tmp_path: Path) -> Callable[[str], Path]:
    def find(kind: str) -> Path:
        if kind == "hf":
            return DATA / "hf"
        if kind == "TQ2_0":
            return DATA / "model-TQ2_0.gguf"
        path = tmp_path / "model-TQ1_0.gguf"
        export.write_gguf(path, *export.read_folder(DATA / "hf"), kind=gguf.GGMLQuantizationType.TQ1_0)
        return path

    return find


def alone(work: Any, ids: list[np.ndarray]) -> list[list[Any]]:
    return [[work(i, len(one))] for i, one in enumerate(ids)]


def batched(work: Any, ids: list[np.ndarray]) -> list[list[Any]]:
    """Chunks of three prompts beside each other, then three rows that decode."""
    steps = [[work(i, 8) for i in range(3)], [work(i, len(one) - 11) for i, one in enumerate(ids)]]
    return steps + [[work(i, 1, decode=True) for i in (1, 2, 0)] for _ in range(3)]


@pytest.mark.parametrize(
    ("kind", "layout"), [("hf", "rows"), ("TQ2_0", "rows"), ("TQ1_0", "rows"), ("TQ2_0", "planar")]
)
def test_logits_are_those_of_the_reference(kind, layout, model_file, expected, paged, work):
    ids = settled_ids(3)
    runner = paged(model_file(kind), layout=layout, S=16)
    for plan in (alone, batched):
        runner.reset()
        for got, want in zip(runner.run(ids, plan(work, ids), tokens=TOKENS), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=CLOSE, rtol=0)


def test_ternary_weights_take_two_bits_on_the_device(model_file, paged):
    runner = paged(model_file("TQ2_0"), layout="planar", S=16)
    down = runner.weight("layers.down")
    assert down.bits == 2
    assert 8 * down.nbytes / (runner.spec.num_layers * runner.spec.dim * runner.spec.ffn_dim) <= 2.25


def test_activations_of_more_bits_would_be_noticed(expected, paged, work):
    """The same weights without the rounding of activations: the difference that `CLOSE` must be below."""
    ids = settled_ids(3)
    runner = paged(DATA / "hf", S=16, change=lambda spec: replace(spec, int8_activations=False))
    got = runner.run(ids, alone(work, ids), tokens=TOKENS)
    assert max(np.abs(mine - want).max() for mine, want in zip(got, expected, strict=True)) > 100 * CLOSE
