"""`atoma-jax eval perplexity` and `kld` around fakes: the JSON object, windows, what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.cli.fake_engine import MAX_MODEL_LEN, FakeLLM, FakePair, FakeTokenizer, nll

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


@pytest.fixture
def kld(run: Run, fake_pair: type[FakePair], text_file: Path) -> Run:
    """`kld("--model", "m", …)` over the text."""
    return lambda *flags: run("eval", "kld", "--base", "b", "--text", str(text_file), *flags)


def test_divergence_as_a_json_object(kld: Run, text_file: Path) -> None:
    result = kld("--model", "m", "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    base = [ord(char) % 10 / 4 for char in TEXT[1:]]
    mean = sum(base) / len(base)
    assert value["base_mean_nll"] == pytest.approx(mean)
    assert value["mean_nll"] == pytest.approx(mean + 0.5)
    assert value["perplexity"] == pytest.approx(math.exp(mean + 0.5))
    assert value["log_perplexity_ratio"] == pytest.approx(0.5)
    assert value["log_perplexity_ratio_se"] == pytest.approx(0, abs=1e-6)
    assert value["mean_kld"] == pytest.approx((mean + 0.5) / 8)
    assert value["max_kld"] == pytest.approx((9 / 4 + 0.5) / 8)
    assert value["same_top"] == pytest.approx(sum(ord(char) % 2 == 0 for char in TEXT[1:]) / len(base))
    assert value["rms_dp"] > value["rms_dp_se"] > 0
    assert {name: value[name] for name in ("model", "base", "text", "tokens", "nan_tokens")} == {
        "model": "m",
        "base": "b",
        "text": str(text_file),
        "tokens": len(TEXT) - 1,
        "nan_tokens": 0,
    }
    assert (value["context"], value["stride"], value["windows"]) == (MAX_MODEL_LEN, MAX_MODEL_LEN - 1, 3)


def test_divergence_over_windows(kld: Run, fake_pair: type[FakePair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTokenizer, "adds_bos", True)
    flags = ("--max-tokens", "100", "--context", "60", "--stride", "30", "--json")
    value = json.loads(kld("--model", "m", *flags).stdout)
    assert (value["tokens"], value["context"], value["stride"], value["windows"]) == (100, 60, 30, 3)
    asked = fake_pair.built[0].asked
    assert [(ids[0], len(ids), first) for ids, first in asked] == [(1, 60, 1), (1, 60, 30), (1, 60, 49)]


def test_what_is_done_to_the_model_is_not_done_to_the_base(kld: Run, fake_pair: type[FakePair]) -> None:
    flags = ("--dtype", "float32", "--quantization", "int4", "--kv-cache-dtype", "int8", "--revision", "r")
    assert kld("--model", "m", *flags).exit_code == 0
    base, model = fake_pair.built[0].configs
    assert (base.model.model, model.model.model) == ("b", "m")
    assert (base.model.dtype, model.model.dtype) == ("float32", "float32")
    assert (base.model.quantization, model.model.quantization) == (None, "int4")
    assert (base.cache.kv_cache_dtype, model.cache.kv_cache_dtype) == ("auto", "int8")
    assert (base.model.revision, model.model.revision) == (None, "r")
    assert base.compile == model.compile


def test_divergence_for_people(kld: Run) -> None:
    lines = kld("--model", "m", "--max-tokens", "101").stdout.splitlines()
    assert lines[0].startswith("perplexity ")
    assert any(line.startswith("mean KLD ") and " ± " in line for line in lines)
    assert any(line.startswith("same top token ") and line.endswith(" %") for line in lines)
    assert lines[-1] == "100 tokens in 1 windows"


def test_nan_is_null_and_is_told(kld: Run) -> None:
    value = json.loads(kld("--model", "nan", "--json", "--max-tokens", "50").stdout)
    assert value["nan_tokens"] == 1
    assert value["mean_kld"] is value["perplexity"] is None
    assert value["base_perplexity"] > 1
    shown = kld("--model", "nan", "--max-tokens", "50").stdout
    assert shown.endswith("49 tokens in 1 windows, at 1 of which a model's logits are not finite\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--model", "m", "--context", "201"),
            "context: must be at most 200, the tokens that both models take, got 201.",
        ),
        (("--model", "m", "--max-tokens", "1"), "The text has 1 tokens: none can be scored."),
        (("--model", "m", "--stride", "0"), "stride must be at least 1 and at most 199, got 0."),
        (("--model", "other"), "base: must have the tokenizer of the model, which reads the text otherwise, got 'b'."),
        (("--model", "m", "--quantization", "int3"), "quantization: must be one of"),
        (("--model", "m", "--num-pages", "7"), "No such option"),
        ((), "model: must name a model"),
    ],
)
def test_what_cannot_be_compared_ends_with_2(kld: Run, flags: tuple[str, ...], message: str) -> None:
    result = kld(*flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_base_must_be_named(run: Run, text_file: Path) -> None:
    result = run("eval", "kld", "--model", "m", "--text", str(text_file))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Missing option '--base'" in result.stderr
