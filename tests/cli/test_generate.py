"""`atoma-jax generate` around a fake engine: what goes to which stream, the JSON object, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.cli.fake_engine import FakeLLM, words

Run = Callable[..., Result]


def test_text_alone_goes_to_standard_output(run: Run, fake_llm: type[FakeLLM]) -> None:
    result = run("generate", "--model", "m", "--prompt", "x", "--max-tokens", "3")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "0 1 2 \n"
    assert "3 tokens, first after 0.500 s, then 10.0 tokens/s" in result.stderr
    assert "weights 0.50, warm_up 0.25" in result.stderr
    assert fake_llm.built[0].is_shut_down


def test_json_is_one_object_with_everything(run: Run, fake_llm: type[FakeLLM]) -> None:
    result = run("generate", "--model", "m", "--prompt", "ab", "--max-tokens", "5", "--temperature", "0", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    value = json.loads(result.stdout)
    assert set(value) == {"model", "prompt", "prompt_token_ids", "num_cached_tokens", "outputs", "timings"}
    assert (value["model"], value["prompt"], value["prompt_token_ids"]) == ("m", "ab", [97, 98])
    (sample,) = value["outputs"]
    assert (sample["index"], sample["text"], sample["token_ids"]) == (0, "".join(words(5)), [7] * 5)
    assert (sample["finish_reason"], sample["stop_reason"], sample["cumulative_logprob"]) == ("length", None, -2.5)
    assert sample["logprobs"][0] == [
        {"token_id": 7, "token": "0 ", "logprob": -0.5, "rank": 1},
        {"token_id": 8, "token": "x", "logprob": -9999.0, "rank": 2},  # -inf is no JSON
    ]
    timings = value["timings"]
    assert (timings["prompt_tokens"], timings["output_tokens"]) == (2, 5)
    assert timings["ttft_s"] == pytest.approx(0.5)
    assert timings["decode_tokens_per_s"] == pytest.approx(10)
    assert list(timings["startup_phases_s"]) == ["imports", "weights", "warm_up"]
    assert timings["startup_s"] == pytest.approx(0.75 + timings["startup_phases_s"]["imports"])
    assert (timings["compile_cache_hits"], timings["compile_cache_misses"]) == (3, 1)
    assert timings["kernels"] == "xla"
    assert "kernels: xla" in result.stderr


def test_sampling_flags_reach_the_request(run: Run, fake_llm: type[FakeLLM]) -> None:
    flags = ("--temperature", "0.5", "--top-p", "0.9", "--top-k", "7", "--min-p", "0.1", "--seed", "3")
    stops = ("--stop", "END", "--stop", "STOP")
    result = run("generate", "--model", "m", "--prompt", "x", "--max-tokens", "2", *flags, *stops)
    assert result.exit_code == 0, result.stderr
    ((prompt, params),) = fake_llm.built[0].asked
    assert (prompt, params.temperature, params.top_p, params.top_k, params.min_p) == ("x", 0.5, 0.9, 7, 0.1)
    assert (params.seed, params.stop, params.max_tokens, params.logprobs) == (3, ("END", "STOP"), 2, None)


def test_flags_that_were_not_given_are_the_models_recommendation(run: Run, fake_llm: type[FakeLLM]) -> None:
    result = run("generate", "--model", "m", "--prompt", "x", "--max-tokens", "2", "--top-k", "0")
    assert result.exit_code == 0, result.stderr
    ((_, params),) = fake_llm.built[0].asked
    assert (params.temperature, params.repetition_penalty, params.top_p) == (0.25, 1.5, 1.0)
    assert (params.top_k, params.max_tokens) == (0, 2), "flags win"


def test_several_samples_are_numbered(run: Run, fake_llm: type[FakeLLM]) -> None:
    result = run("generate", "--model", "m", "--prompt", "x", "--max-tokens", "1", "--n", "2")
    assert result.stdout == "[1/2] 0 \n[2/2] 0 \n"


@pytest.mark.parametrize("streamed", [True, False])
def test_chat_puts_the_prompt_into_the_template(run: Run, fake_llm: type[FakeLLM], streamed: bool) -> None:
    flags = () if streamed else ("--json",)
    result = run("generate", "--model", "m", "--prompt", "Hi", "--chat", "--system", "Be brief.", *flags)
    assert result.exit_code == 0, result.stderr
    assert fake_llm.built[0].asked[0][0] == "<system>Be brief.<user>Hi"


def test_the_prompt_may_come_from_a_file_or_from_standard_input(
    run: Run, fake_llm: type[FakeLLM], tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("aus der Datei: ä")
    run("generate", "--model", "m", "--prompt-file", str(file))
    run("generate", "--model", "m", "--prompt-file", "-", stdin="from a pipe")
    assert [llm.asked[0][0] for llm in fake_llm.built] == ["aus der Datei: ä", "from a pipe"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", "x", "--temperature", "nan"), "temperature must be a finite number, got nan."),
        (("--prompt", "x", "--temperature", "-1"), "temperature must be non-negative, got -1.0."),
        (("--prompt", "x", "--top-p", "0"), "top_p must be in (0, 1], got 0.0."),
        (("--prompt", "x", "--max-tokens", "0"), "max_tokens must be at least 1, got 0."),
        (("--prompt", "x", "--stop", ""), "stop cannot contain an empty string."),
        (("--prompt", "x", "--system", "s"), "system: needs --chat"),
        (("--prompt", "x", "--logprobs", "2"), "logprobs: needs --json"),
        (("--prompt", "x", "--prompt-file", "f"), "give exactly one of --prompt and --prompt-file"),
        ((), "give exactly one of --prompt and --prompt-file"),
        (("--prompt-file", "absent.txt"), "prompt_file: cannot be read: No such file or directory, got 'absent.txt'."),
    ],
)
def test_what_cannot_be_ends_with_2_before_an_engine_is_built(
    run: Run, fake_llm: type[FakeLLM], flags: tuple[str, ...], message: str
) -> None:
    result = run("generate", "--model", "m", *flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert not fake_llm.built


def test_a_prompt_that_is_no_text_is_refused(run: Run, fake_llm: type[FakeLLM], tmp_path: Path) -> None:
    file = tmp_path / "prompt.bin"
    file.write_bytes(b"\xff\xfe\x00")
    result = run("generate", "--model", "m", "--prompt-file", str(file))
    assert result.exit_code == 2
    assert "must be UTF-8 text" in result.stderr


def test_a_prompt_that_is_too_long_ends_with_2(run: Run, fake_llm: type[FakeLLM]) -> None:
    result = run("generate", "--model", "m", "--prompt", "x" * 250)
    assert result.exit_code == 2
    assert "maximum context length is 200 tokens. However, your prompt contains 250" in result.stderr
