"""`atoma-jax bench serve` as a program, against a server that answers what a script says."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from atoma_jax.cli import app
from tests.benchmarks.serve.fake_server import DONE, answer_of, fake_server, text, usage

KEYS = {
    *("date", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness"),
    *("max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
    *("max_output_tokens_per_s", "max_concurrent_requests"),
    *(f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl", "e2el")),
    *("input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors"),
}


def bench(url: str, *flags: str) -> Result:
    return CliRunner().invoke(app, ["bench", "serve", "--base-url", url, *flags])


def measured(url: str, *flags: str) -> dict[str, Any]:
    result = bench(url, *flags, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


SMALL = ("--num-prompts", "6", "--random-input-len", "5", "--random-output-len", "4")


def test_one_object_with_the_keys_of_vllms_benchmark() -> None:
    with fake_server() as server:
        value = measured(f"{server.url}/v1/", *SMALL, "--num-warmups", "2", "--api-key", "k", "--goodput", "ttft:60000")
    assert value.keys() >= KEYS
    assert (value["completed"], value["failed"], value["request_rate"], value["model_id"]) == (6, 0, "inf", "fake")
    assert (value["total_input_tokens"], value["total_output_tokens"]) == (30, 24)
    assert value["request_goodput"] == value["request_throughput"]
    assert len(server.asked) == 2 + 6  # warm-ups are not counted
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer k"}
    for body in server.asked:
        assert (body["max_tokens"], len(body["prompt"]), body["ignore_eos"], body["temperature"]) == (4, 5, True, 0)
        assert all(token > 100 for token in body["prompt"])  # ids that the server's /tokenize gave
    counted = [tuple(body["prompt"]) for body in server.asked[2:]]
    assert len(set(counted)) == 6


def test_failed_requests_are_counted_and_nothing_else_of_them() -> None:
    calls: Counter[str] = Counter()

    def every_third_fails(body: dict[str, Any]) -> tuple[int, list[bytes]]:
        calls["all"] += 1
        return (429, [b'{"error": {"message": "full"}}']) if calls["all"] % 3 == 0 else answer_of(body)

    with fake_server(every_third_fails) as server:
        value = measured(server.url, *SMALL, "--num-warmups", "0")
    assert (value["completed"], value["failed"], value["total_output_tokens"]) == (4, 2, 16)
    assert value["errors"].count("HTTP 429: full") == 2


def test_a_server_without_tokenize_gets_words(capfd: pytest.CaptureFixture[str]) -> None:
    """Which have two tokens each here, as the server's usage says."""

    def two_a_word(body: dict[str, Any]) -> tuple[int, list[bytes]]:
        return 200, [text("a"), usage(3 + 2 * len(body["prompt"].split()), 1), DONE]

    with fake_server(two_a_word, tokenizes=False, max_model_len=None) as server:
        value = measured(server.url, *SMALL[:2], "--random-input-len", "10", "--num-warmups", "0")
    assert value["input_lens"] == [13] * 6


def test_chat_and_the_words_of_sharegpt(tmp_path: Path) -> None:
    def chat(body: dict[str, Any]) -> tuple[int, list[bytes]]:
        chunk = {"choices": [{"delta": {"content": "x"}}]}
        return 200, [b"data: " + json.dumps(chunk).encode() + b"\n\n", usage(5, body["max_completion_tokens"]), DONE]

    def talk(question: str, answer: str) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}

    path = tmp_path / "talks.json"
    talks = [talk("a b c d e", "f g h i j k"), talk("too short", "a b c d"), talk("w x y z", "1 2 3 4"), {"id": 1}]
    path.write_text(json.dumps(talks))
    with fake_server(chat) as server:
        flags = ("--backend", "openai-chat", "--dataset-name", "sharegpt", "--dataset-path", str(path))
        value = measured(server.url, *flags, "--num-prompts", "2", "--num-warmups", "0", "--no-ignore-eos")
        assert bench(server.url, *flags, "--num-prompts", "3").exit_code == 2
    assert (value["backend"], value["total_output_tokens"]) == ("openai-chat", 6 + 4)
    asked = {body["messages"][0]["content"]: body for body in server.asked}
    assert asked.keys() == {"a b c d e", "w x y z"}
    assert all("ignore_eos" not in body for body in server.asked)


def test_never_more_at_once_than_asked_for() -> None:
    with fake_server() as server:
        value = measured(server.url, *SMALL, "--max-concurrency", "1", "--request-rate", "10000")
    assert value["max_concurrent_requests"] == 1
    assert (value["request_rate"], value["max_concurrency"]) == (10000, 1)


def test_a_sweep_and_its_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "sweep.png"
    with fake_server() as server:
        value = measured(server.url, *SMALL, "--sweep-concurrency", "1,2", "--plot", str(path), "--no-detail")
    assert value["sweep"] == "max_concurrency"
    assert [run["max_concurrency"] for run in value["runs"]] == [1, 2]
    assert all(run["completed"] == 6 for run in value["runs"])
    prompts = [tuple(body["prompt"]) for body in server.asked]
    assert len(set(prompts)) == 12  # no run meets the prompts of the one before; the warm-up is the first's
    assert path.read_bytes().startswith(b"\x89PNG")


def test_for_people() -> None:
    with fake_server() as server:
        result = bench(server.url, *SMALL, "--goodput", "tpot:60000", "--metric-percentiles", "50,99.9")
    assert result.exit_code == 0, result.stderr
    assert "completed                 6\n" in result.stdout
    assert "p99.9" in result.stdout
    assert "6/6" in result.stderr  # the progress bar


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--model", "other"), 2, "the server has only fake"),
        (("--random-input-len", "61", "--random-output-len", "4"), 2, "do not fit into the model's 64"),
        (("--plot", "x.png"), 2, "give --sweep-rates"),
        (("--sweep-rates", "1,2", "--sweep-concurrency", "1"), 2, "contradicts"),
        (("--sweep-rates", "1,x"), 2, "numbers with commas"),
        (("--sweep-concurrency", "1.5"), 2, "whole numbers"),
        (("--goodput", "itl:5"), 2, "must be ttft, tpot or e2el"),
        (("--goodput", "ttft:-5"), 2, "above 0"),
        (("--burstiness", "0"), 2, "must be above 0"),
        (("--request-rate", "0"), 2, "must be above 0"),
        (("--metric-percentiles", "101"), 2, "up to 100"),
        (("--extra-body", "[]"), 2, "must be a JSON object"),
        (("--dataset-name", "sharegpt"), 2, "dataset_path"),
        (("--dataset-path", "x.json"), 2, "dataset_path"),
        (("--dataset-name", "sharegpt", "--dataset-path", "absent.json"), 2, "cannot be read"),
        (("--extra-body", '{"max_tokens": 1}', "--num-prompts", "1"), 0, ""),
    ],
)
def test_what_cannot_be_is_refused_by_name(flags: tuple[str, ...], code: int, message: str) -> None:
    with fake_server() as server:
        result = bench(server.url, *SMALL, *flags)
    assert result.exit_code == code, result.stderr
    assert message in result.stderr


def test_no_server() -> None:
    result = bench("http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "no OpenAI-compatible server answers" in result.stderr


def test_nothing_but_failures_ends_with_1() -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, list[bytes]]:
        return 503, [b'{"error": {"message": "down"}}']

    with fake_server(refuse) as server:
        warm, cold = bench(server.url, *SMALL), bench(server.url, *SMALL, "--num-warmups", "0")
    assert (warm.exit_code, cold.exit_code) == (1, 1)
    assert "warm-up request" in warm.stderr
    assert "HTTP 503: down" in cold.stderr
