"""Clients of others, as their makers ship them, against the program. Those that are not there are skipped."""

import math
import os
import shutil
import subprocess
from importlib import import_module
from types import ModuleType

import httpx2
import pytest

KEY = {"Authorization": "Bearer secret"}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # theirs


def installed(name: str) -> ModuleType:
    return pytest.importorskip(name, reason=f"{name} is not installed")


def test_lm_eval_scores_as_the_engine_does(live: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`local-completions` finds the tokenizer by itself, and its loglikelihoods are the prompt logprobs."""
    installed("lm_eval")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    instance = import_module("lm_eval.api.instance").Instance
    model = import_module("lm_eval.models.openai_completions").LocalCompletionsAPI(
        base_url=f"{live}/v1/completions",
        model="tiny",
        num_concurrent=4,
        max_length=64,
        tokenizer_backend="remote",
        auth_token="secret",
    )
    pairs = [("The the", " at in"), ("on a", "re"), ("abc", " the")]
    scores = model.loglikelihood([instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)])
    with httpx2.Client(base_url=live, headers=KEY) as client:
        for (context, rest), (score, _) in zip(pairs, scores, strict=True):
            ids = client.post("/tokenize", json={"prompt": context + rest}).json()["tokens"]
            start = client.post("/tokenize", json={"prompt": context}).json()["count"]
            ask = {"prompt": ids, "prompt_logprobs": 0, "max_tokens": 1}
            entries = client.post("/v1/completions", json=ask).json()["choices"][0]["prompt_logprobs"]
            own = [entry[str(token)]["logprob"] for token, entry in zip(ids[start:], entries[start:], strict=True)]
            assert math.isclose(score, sum(own), rel_tol=1e-12)


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
