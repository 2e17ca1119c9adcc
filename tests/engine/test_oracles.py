"""The engine with real models against llama.cpp: prompts scored, greedy answers, chat templates.

`tests/data` holds what llama.cpp makes of the same weights: `tight` in F32, `loose` with its default int8 activations.
`tests/models/test_oracles.py` holds the model alone to them and to float64; here prompts go through the whole engine.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoma_jax import LLM, SamplingParams
from atoma_jax.native.library import library

pytestmark = pytest.mark.model

DATA = Path(__file__).parents[1] / "data"
SHORT = 256  # tokens scored where time is short
CLOSE = 0.02  # nats of a token


@pytest.fixture(
    scope="module", params=["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)], ids=["smollm2", "gemma3"]
)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def real_llm(name: str, request: pytest.FixtureRequest) -> LLM:
    """As near to float64 as the kernels of this machine get."""
    path = request.getfixturevalue({"smollm2": "smollm2_path", "gemma3": "gemma3_path"}[name])
    return LLM(
        str(path),
        dtype="float32",
        cpu_precision="high" if library() else "default",
        max_model_len=2112,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        decode_rows=(4,),
        prefill_tokens=(64,),
        score_tokens=64,
    )


def oracle(name: str, kind: str) -> dict[str, Any]:
    return json.loads((DATA / "oracle_generations.json").read_text())[name][kind]


def nll_of(llm: LLM, ids: list[int]) -> np.ndarray:
    """Of each token after the first."""
    (output,) = llm.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    scored = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    return -np.asarray([entry[token].logprob for token, entry in scored])


def check_nll(name: str, llm: LLM, count: int) -> np.ndarray:
    data = np.load(DATA / "oracle_nll.npz")
    nll = nll_of(llm, data[f"{name}_ids"][:count].tolist())
    wanted, exact = (data[f"{name}_{who}"][: count - 1] for who in ("llama_cpp", "transformers"))
    # Of single tokens of Gemma llama.cpp itself is up to 0.04 off float64, as it rounds to f16.
    far = np.abs(nll - wanted) > CLOSE
    assert (np.abs(nll - exact)[far] < np.abs(wanted - exact)[far] / 4).all()
    assert np.abs(nll - exact).max() < CLOSE
    assert nll.mean() == pytest.approx(wanted.mean(), abs=1e-3)
    return nll


def test_each_token_of_a_text_is_as_likely_as_to_llama_cpp(name: str, real_llm: LLM) -> None:
    check_nll(name, real_llm, SHORT)


@pytest.mark.slow
def test_so_it_is_over_the_whole_text(name: str, real_llm: LLM) -> None:
    nll = check_nll(name, real_llm, 2048)
    assert np.exp(nll.mean()) == pytest.approx(oracle(name, "tight")["perplexity"], rel=2e-3)
    assert np.exp(nll.mean()) == pytest.approx(oracle(name, "loose")["perplexity"], rel=0.015)


def test_greedy_answers_agree_until_llama_cpp_is_in_doubt(name: str, real_llm: LLM) -> None:
    generations = oracle(name, "tight")["generations"]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    outputs = real_llm.generate([g["prompt_ids"] for g in generations], params, use_tqdm=False)
    compared = 0
    for output, generation in zip(outputs, generations, strict=True):
        for got, wanted, margin in zip(
            output.outputs[0].token_ids, generation["output_ids"], generation["margins"], strict=True
        ):
            if got != wanted:
                assert margin < 0.05
                break
            compared += 1
    assert compared > 16 * len(generations)
    real_llm.llm_engine.check_integrity()
    assert real_llm.llm_engine.num_recompilations == 0


@pytest.mark.parametrize(("kind", "margin"), [("tight", 0.05), ("loose", 0.5)])
def test_the_likeliest_tokens_are_llama_cpps(name: str, real_llm: LLM, kind: str, margin: float) -> None:
    """Teacher-forced: its answers are scored as prompts."""
    for generation in oracle(name, kind)["generations"]:
        prompt, answer = generation["prompt_ids"], generation["output_ids"]
        params = SamplingParams(max_tokens=1, prompt_logprobs=20)
        (output,) = real_llm.generate([prompt + answer], params, use_tqdm=False)
        entries = output.prompt_logprobs[len(prompt) :]
        for entry, token, doubt in zip(entries, answer, generation["margins"], strict=True):
            assert entry[token].rank == 1 or doubt < margin
        if kind == "tight":
            for entry, top5 in zip(entries, generation["top5"], strict=False):
                assert {token: entry[token].logprob for token, _ in top5} == pytest.approx(dict(top5), abs=0.02)


def test_the_kernels_default_arithmetic_is_as_near_as_llama_cpps(name: str, request: pytest.FixtureRequest) -> None:
    """Both round activations to int8; over this text, llama.cpp's own default moves single tokens further than this."""
    if library() is None:
        pytest.skip("the native kernels are not built, or do not fit; the log says why")
    path = request.getfixturevalue({"smollm2": "smollm2_path", "gemma3": "gemma3_path"}[name])
    llm = LLM(
        str(path),
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        decode_rows=(4,),
        prefill_tokens=(64,),
        score_tokens=64,
    )
    data = np.load(DATA / "oracle_nll.npz")
    nll, wanted = nll_of(llm, data[f"{name}_ids"][:SHORT].tolist()), data[f"{name}_llama_cpp"][: SHORT - 1]
    assert nll.mean() == pytest.approx(wanted.mean(), rel=0.005)
    for generation in oracle(name, "loose")["generations"]:
        prompt, answer = generation["prompt_ids"], generation["output_ids"]
        (output,) = llm.generate([prompt + answer], SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False)
        entries = output.prompt_logprobs[len(prompt) :]
        for entry, token, doubt in zip(entries, answer, generation["margins"], strict=True):
            assert entry[token].rank == 1 or doubt < 0.5


def test_prompts_become_the_same_tokens(name: str, real_llm: LLM) -> None:
    prompts = [generation["prompt_ids"] for generation in oracle(name, "tight")["generations"]]
    tokenizer = real_llm.get_tokenizer()
    assert tokenizer.encode("The capital of France is") == prompts[0]
    if name == "smollm2":
        question = {"role": "user", "content": "What is the largest planet in the solar system?"}
        assert real_llm.render([question])["prompt_token_ids"] == prompts[3]
