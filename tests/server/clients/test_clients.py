"""Clients of others, as their makers ship them (extra `clients`), against the program. What is not there is skipped."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from atoma_jax import LLM, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # theirs


def installed(name: str) -> ModuleType:
    return pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.fixture
def evaluated(live: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's `local-completions`, which finds the tokenizer by itself."""
    installed("lm_eval")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    return import_module("lm_eval.models.openai_completions").LocalCompletionsAPI(
        base_url=f"{live}/v1/completions",
        model="tiny",
        num_concurrent=4,
        max_length=64,
        max_retries=1,
        tokenizer_backend="remote",
        auth_token="secret",
    )


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What lm-eval's tasks ask a model."""
    made = import_module("lm_eval.api.instance").Instance
    return [made(kind, {}, pair, number) for number, pair in enumerate(arguments)]


def test_lm_eval_scores_as_the_engine_does(evaluated: Any, llm: LLM) -> None:
    """Its loglikelihoods are those that the engine gives offline, and so is whether a text is what greedy would say."""
    pairs = [("The the", " at in"), ("on a", "re"), ("abc", " the"), ("The", "\n")]
    scores = evaluated.loglikelihood(instances("loglikelihood", pairs))
    tokenizer = llm.get_tokenizer()
    for (context, rest), (score, is_greedy) in zip(pairs, scores, strict=True):
        ids, start = tokenizer.encode(context + rest), len(tokenizer.encode(context))
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        (output,) = llm.generate([ids], params, use_tqdm=False)
        assert output.prompt_logprobs is not None
        entries = [(token, entry or {}) for token, entry in zip(ids, output.prompt_logprobs, strict=True)][start:]
        assert score == pytest.approx(sum(entry[token].logprob for token, entry in entries), abs=1e-3)
        assert is_greedy == all(entry[token].rank == 1 for token, entry in entries)


def test_lm_eval_generates_as_the_engine_does(evaluated: Any, llm: LLM) -> None:
    prompts = ["The the", "on a", "abc"]
    asked = instances("generate_until", [(prompt, {"until": ["zz"], "max_gen_toks": 6}) for prompt in prompts])
    params = SamplingParams(temperature=0, max_tokens=6, stop=["zz"])
    offline = [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]
    assert evaluated.generate_until(asked) == offline


@pytest.mark.skipif(shutil.which("guidellm") is None, reason="guidellm is not installed")
@pytest.mark.parametrize(("profile", "runs"), [("concurrent,streams=4", 1), ("sweep,sweep_size=4", 4)])
def test_guidellm_measures_and_nothing_fails(live: str, tmp_path: Path, profile: str, runs: int) -> None:
    """It asks for usage on every chunk, and counts its tokens by that. A sweep: one after the other, all at once, and
    rates between these."""
    items = [{"prompt": f"fact {number}", "output_tokens_count": 7} for number in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, items)))
    command = [
        "guidellm",
        "run",
        "--backend",
        f"kind=openai_http,target={live},api_key=secret",
        "--profile",
        f"kind={profile}",
    ]
    command += ["--data", f"kind=json_file,path={tmp_path}/prompts.jsonl", "--constraint", "kind=max_requests,count=8"]
    command += ["--output", f"kind=json,path={tmp_path}/result.json", "--disable-console"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "result.json").read_text())["benchmarks"]
    assert len(results) == runs
    for result in results:
        requests = result["requests"]
        assert (len(requests["successful"]), len(requests["errored"])) == (8, 0)
        assert {request["output_tokens"] for request in requests["successful"]} == {7}


def test_langchain(live: str) -> None:
    chat = installed("langchain_openai").ChatOpenAI(
        base_url=f"{live}/v1", api_key="secret", model="tiny", max_tokens=8, temperature=0
    )
    answer = chat.invoke("Hi")
    assert answer.usage_metadata["output_tokens"] <= 8
    assert "".join(piece.content for piece in chat.stream("Hi")) == answer.content


@pytest.mark.skipif(shutil.which("schemathesis") is None, reason="schemathesis is not installed")
def test_schemathesis_finds_no_fault(live: str) -> None:
    """Requests made from the OpenAPI description."""
    limits = ("--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--max-examples", "20")
    command = ["schemathesis", "run", f"{live}/openapi.json", "--header", "Authorization: Bearer secret", *limits]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stdout
    assert "Tested: 16" in done.stdout
