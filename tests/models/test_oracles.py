"""Real models against llama.cpp and against `transformers` in float64, over the same weights.

`tests/data/oracle_nll.npz` holds 2,048 ids of the World English Bible for each model and the NLL of each next token:
`llama_cpp` by llama.cpp over the file's weights in F32, `transformers` in float64 over the same. The generations in
`oracle_generations.json` are llama.cpp's: `tight` over weights in F32, `loose` with its default int8 activations.
"""

import json
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.model]

DATA = Path(__file__).parents[1] / "data"
CHUNK = 256

# Tokens where llama.cpp is further from float64 than the 0.02 that it is held to elsewhere, and how far. It rounds its
# cache, and the argument and result of GELU, to f16: doing so here moves single tokens of Gemma by up to 0.039.
LLAMA_CPP_ASTRAY = {"smollm2": {}, "gemma3": {1678: 0.0374, 1788: 0.0223}}


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name, request, paged):
    path = request.getfixturevalue({"smollm2": "smollm2_path", "gemma3": "gemma3_path"}[name])
    return paged(path, S=16, B=1, W=130)


@pytest.fixture(scope="module")
def nll(name, model, work):
    """Of 2,047 tokens, teacher-forced in chunks."""
    ids = np.load(DATA / "oracle_nll.npz")[f"{name}_ids"]
    out = []
    for start in range(0, len(ids), CHUNK):
        (logits,) = model.run([ids], [[work(0, CHUNK)]], tokens=CHUNK)
        following = ids[start + 1 : start + CHUNK + 1]
        out.append(-log_softmax(logits)[np.arange(len(following)), following])
    return np.concatenate(out)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True, dtype=np.float64))


def test_every_token_is_within_a_thousandth_of_float64(name, nll):
    assert np.abs(nll - np.load(DATA / "oracle_nll.npz")[f"{name}_transformers"]).max() < 1e-3


def test_llama_cpp_agrees_within_two_hundredths(name, nll):
    wanted = np.load(DATA / "oracle_nll.npz")[f"{name}_llama_cpp"]
    error = np.abs(nll - wanted)
    assert abs(nll.mean() - wanted.mean()) < 1e-3
    astray = {int(i): error[i] for i in np.flatnonzero(error > 0.02)}
    assert astray == pytest.approx(LLAMA_CPP_ASTRAY[name], abs=1e-3)


def test_perplexity_is_near_that_of_llama_cpps_default_arithmetic(name, nll):
    oracle = json.loads((DATA / "oracle_generations.json").read_text())[name]["loose"]
    assert np.exp(nll.mean()) == pytest.approx(oracle["perplexity"], rel=0.015)


@pytest.mark.parametrize(("oracle", "margin"), [("tight", 0.04), ("loose", 0.5)])
def test_greedy_tokens_wherever_the_margin_is_beyond_rounding(name, model, work, oracle, margin):
    for generation in json.loads((DATA / "oracle_generations.json").read_text())[name][oracle]["generations"]:
        prompt, output = generation["prompt_ids"], generation["output_ids"]
        ids = np.asarray(prompt + output, np.int32)
        model.reset()
        (logits,) = model.run([ids], [[work(0, len(ids))]], tokens=CHUNK)
        scores = log_softmax(logits)[len(prompt) - 1 : -1]
        clear = np.asarray(generation["margins"]) > margin
        assert clear.sum() > len(output) // 3
        np.testing.assert_array_equal(scores.argmax(-1)[clear], np.asarray(output)[clear])
        if oracle == "tight":
            for step, top5 in enumerate(generation["top5"]):
                for token, logprob in top5:
                    assert scores[step, token] == pytest.approx(logprob, abs=0.02)
