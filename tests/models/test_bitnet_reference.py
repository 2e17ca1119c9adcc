"""The float64 reference of BitNet computes what `transformers` computes on the ternary test model.

Measured with torch 2.13 and transformers 5.24, on 202 tokens with logits of up to 18: with the same int8 codes the two
differ by at most 1.0e-5. Left alone they differ from the first activation on that falls on the other side of a rounding
edge (token 16), by at most 0.04 in a logit and 0.018 in the logprob of a next token, 0.002 on average.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.models.bitnet_reference import EDGE, BitNetReference

torch = pytest.importorskip("torch", reason="needs the extra `oracle`: torch")
transformers = pytest.importorskip("transformers", reason="needs the extra `oracle`: transformers")
pytest.importorskip("accelerate", reason="needs the extra `oracle`: accelerate")

# torch imports its own compiler for the decorators of BitNet's module, and warns about itself.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")

DATA = Path(__file__).parents[1] / "data" / "ternary"
# Romans 8:35-39, World English Bible: of the book that training did not see.
PASSAGE = (
    "Who shall separate us from the love of Christ? Could oppression, or anguish, or persecution, or famine, or "
    'nakedness, or peril, or sword? Even as it is written, "For your sake we are killed all day long. We were '
    'accounted as sheep for the slaughter." No, in all these things, we are more than conquerors through him who '
    "loved us. For I am persuaded, that neither death, nor life, nor angels, nor principalities, nor things "
    "present, nor things to come, nor powers, nor height, nor depth, nor any other created thing, will be able to"
    " separate us from the love of God, which is in Christ Jesus our Lord."
)
CLOSE = 2e-5  # of logits: float32 against float64


class Oracle:
    """`BitNetForCausalLM` in float32, and the int8 codes that it chose in its last pass."""

    def __init__(self, folder: Path):
        self._model = transformers.BitNetForCausalLM.from_pretrained(folder, dtype=torch.float32)
        # A quantized model keeps its other weights in the file's bfloat16 and refuses `.float()`: widening is exact.
        torch.nn.Module.float(self._model)
        self.codes: dict[str, np.ndarray] = {}
        for name, module in self._model.named_modules():
            if type(module).__name__ in ("AutoBitLinear", "BitLinear"):
                module.register_forward_pre_hook(self._keeps_codes(name))

    def _keeps_codes(self, name: str) -> Any:
        def keep(module: Any, inputs: tuple[Any]) -> None:
            x = inputs[0]
            scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
            self.codes[name] = (x * scale).round().clamp(-128, 127)[0].numpy()

        return keep

    def logits(self, ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self._model(torch.from_numpy(ids)[None]).logits[0].numpy()


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    with torch.compiler.set_stance("force_eager"):  # BitNet's quantizers would be compiled with a C++ compiler
        yield Oracle(DATA / "hf")


@pytest.fixture(scope="module")
def reference() -> BitNetReference:
    return BitNetReference(DATA / "hf")


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return encode(PASSAGE)


def encode(text: str) -> np.ndarray:
    return np.array(Tokenizer.from_file(str(DATA / "hf" / "tokenizer.json")).encode(text).ids)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_with_the_same_roundings_all_logits_are_those_of_transformers(oracle, reference, ids):
    expected = oracle.logits(ids)
    found = reference.forward(ids, oracle.codes)
    np.testing.assert_allclose(found.logits, expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("case", json.loads((DATA / "settled.json").read_text()), ids=lambda case: case["text"][:24])
def test_logits_are_those_of_transformers_where_no_rounding_is_on_edge(oracle, reference, case):
    ids = encode(case["text"])
    found = reference.forward(ids)
    assert found.edge[-1] > EDGE, "a text without edges"
    np.testing.assert_allclose(found.logits, oracle.logits(ids), rtol=0, atol=CLOSE)


def test_edges_move_logprobs_little(oracle, reference, ids):
    found, expected = (log_softmax(logits) for logits in (reference.forward(ids).logits, oracle.logits(ids)))
    off = np.abs(found - expected)[np.arange(len(ids) - 1), ids[1:]]
    assert off.mean() < 0.005
    assert off.max() < 0.05


def test_unfair_roundings_are_noticed(oracle, reference, ids):
    oracle.logits(ids)
    name = "model.layers.2.mlp.down_proj"
    wrong = oracle.codes | {name: oracle.codes[name] + 1}
    with pytest.raises(AssertionError, match="down_proj: not the nearest steps"):
        reference.forward(ids, wrong)


def test_scales_that_divide_are_read_as_transformers_reads_them(oracle, reference, ids, tmp_path):
    """`linear_class: bitlinear`, the older convention: the scale is a divisor."""
    from safetensors.torch import load_file, save_file

    config = json.loads((DATA / "hf" / "config.json").read_text())
    config["quantization_config"]["linear_class"] = "bitlinear"
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(DATA / "hf" / "model.safetensors")
    inverse = {name: (1 / tensor.float()).bfloat16() for name, tensor in tensors.items() if name.endswith("_scale")}
    save_file(tensors | inverse, tmp_path / "model.safetensors", metadata={"format": "pt"})
    dividing, theirs = BitNetReference(tmp_path), Oracle(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_allclose(dividing.weights[name], reference.weights[name], rtol=2**-8)
    expected = theirs.logits(ids)
    np.testing.assert_allclose(dividing.forward(ids, theirs.codes).logits, expected, rtol=0, atol=CLOSE)


def test_the_model_has_learnt_from_its_training(reference, ids):
    logprobs = log_softmax(reference.forward(ids).logits)
    nll = -logprobs[np.arange(len(ids) - 1), ids[1:]].mean()
    report = json.loads((DATA / "training.json").read_text())
    assert nll < np.log(report["shape"]["V"]) - 2, "much better than a guess among all tokens"
    assert abs(nll - report["held_out_nats_a_token"]) < 0.7, "a passage of the book that the report is about"
