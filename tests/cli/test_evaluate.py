"""`atoma-jax eval perplexity` around a fake engine: the JSON object, windows, what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.cli.fake_engine import MAX_MODEL_LEN, FakeLLM, FakeTokenizer, nll

Run = Callable[..., Result]

TEXT = "The quick brown fox jumps over the lazy dog. " * 12  # 540 tokens of the fake, more than its model takes


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_json_object(run: Run, fake_llm: type[FakeLLM], text_file: Path) -> None:
    result = run("eval", "perplexity", "--model", "m", "--text", str(text_file), "--json", "--per-token")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    expected = [-nll(ord(char)) for char in TEXT[1:]]
    assert value.pop("nll") == expected
    assert value.pop("token_ids") == [ord(char) for char in TEXT[1:]]
    assert value.pop("mean_nll") == pytest.approx(sum(expected) / len(expected))
    assert value.pop("perplexity") == pytest.approx(math.exp(sum(expected) / len(expected)))
    assert value.pop("standard_error") > 0
    assert value == {
        "model": "m",
        "text": str(text_file),
        "tokens": len(TEXT) - 1,
        "context": MAX_MODEL_LEN - 1,
        "stride": MAX_MODEL_LEN - 2,
        "windows": 3,
    }


def test_max_tokens_context_and_stride(run: Run, fake_llm: type[FakeLLM], text_file: Path) -> None:
    flags = ("--max-tokens", "100", "--context", "50", "--stride", "25", "--json")
    value = json.loads(run("eval", "perplexity", "--model", "m", "--text", str(text_file), *flags).stdout)
    assert (value["tokens"], value["context"], value["stride"], value["windows"]) == (99, 50, 25, 3)
    assert "nll" not in value


def test_a_models_bos_stands_before_every_window_and_lets_the_first_token_count(
    run: Run, fake_llm: type[FakeLLM], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTokenizer, "adds_bos", True)
    flags = ("--max-tokens", "100", "--context", "60", "--json")
    value = json.loads(run("eval", "perplexity", "--model", "m", "--text", str(text_file), *flags).stdout)
    assert (value["tokens"], value["stride"]) == (100, 58)
    assert all(prompt["prompt_token_ids"][0] == 1 for prompt, _ in fake_llm.built[0].asked)


def test_for_people(run: Run, fake_llm: type[FakeLLM], text_file: Path) -> None:
    result = run("eval", "perplexity", "--model", "m", "--text", str(text_file), "--max-tokens", "9")
    assert result.stdout.startswith("perplexity ")
    assert result.stdout.endswith(", 8 tokens\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--text", "absent.txt"), "text: cannot be read: No such file or directory, got 'absent.txt'."),
        (("--text", "{text}", "--context", "500"), "context: must be at most 199"),
        (("--text", "{text}", "--context", "1"), "context must be at least 2, got 1."),
        (("--text", "{text}", "--stride", "300"), "stride must be at least 1 and at most 198, got 300."),
        (("--text", "{text}", "--per-token"), "per_token: needs --json"),
        (("--text", "{text}", "--max-tokens", "0"), "Invalid value for '--max-tokens'"),
    ],
)
def test_what_cannot_be_ends_with_2(
    run: Run, fake_llm: type[FakeLLM], text_file: Path, flags: tuple[str, ...], message: str
) -> None:
    result = run("eval", "perplexity", "--model", "m", *(flag.replace("{text}", str(text_file)) for flag in flags))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
