"""The commands around the engine itself, on a tiny model: what fakes cannot show."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

ROOT = Path(__file__).parents[2]

Run = Callable[..., Result]


@pytest.fixture
def engine(tiny_model_path: Path, small_engine: tuple[str, ...]) -> list[str]:
    """Flags of a small engine over the tiny model."""
    return ["--model", str(tiny_model_path), *small_engine]


def test_generate_twice_gives_the_same_and_the_stream_equals_the_whole(run: Run, engine: list[str]) -> None:
    flags = ("--prompt", "the cat", "--max-tokens", "8", "--temperature", "0")
    whole = run("generate", *engine, *flags, "--json")
    assert whole.exit_code == 0, whole.stderr
    value = json.loads(whole.stdout)
    (sample,) = value["outputs"]
    assert len(sample["token_ids"]) == len(sample["logprobs"]) == 8
    for token_id, entry in zip(sample["token_ids"], sample["logprobs"], strict=True):
        assert (entry[0]["token_id"], entry[0]["rank"]) == (token_id, 1)  # greedy
    assert sample["cumulative_logprob"] == pytest.approx(sum(entry[0]["logprob"] for entry in sample["logprobs"]))
    assert value["timings"]["ttft_s"] > 0
    assert {"resolve", "tokenizer", "weights", "compile", "warm_up"} < set(value["timings"]["startup_phases_s"])
    assert run("generate", *engine, *flags).stdout == sample["text"] + "\n"


def test_a_prompt_that_is_too_long_ends_with_2(run: Run, engine: list[str]) -> None:
    result = run("generate", *engine, "--prompt", "x" * 65)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "maximum context length is 64 tokens. However, your prompt contains 65" in result.stderr


def test_chat_goes_on_after_a_message_that_is_too_long(run: Run, engine: list[str]) -> None:
    result = run("chat", *engine, "--max-tokens", "4", stdin=f"{'x' * 65}\nhi\n")
    assert result.exit_code == 0, result.stderr
    assert "maximum context length is 64 tokens" in result.stderr
    assert result.stdout.endswith("\n")


def test_scores_do_not_depend_on_how_a_text_is_cut(run: Run, engine: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("in the hat a cat sat on the mat and ate")

    def nll(*flags: str) -> list[float]:
        result = run("eval", "perplexity", *engine, "--text", str(text), "--json", "--per-token", *flags)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)["nll"]

    whole, cut = nll(), nll("--context", "16", "--stride", "8")
    assert len(cut) == len(whole)
    assert cut[:15] == pytest.approx(whole[:15], abs=1e-4)  # the first window sees all that the whole does


def test_divergence_finds_the_perplexity_that_the_engine_finds(run: Run, engine: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("in the hat a cat sat on the mat and ate")
    flags = ("--text", str(text), "--context", "16", "--stride", "8", "--json")
    alone = json.loads(run("eval", "perplexity", *engine, *flags).stdout)
    result = run("eval", "kld", *engine, "--base", engine[1], *flags)
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert value["mean_nll"] == value["base_mean_nll"] == pytest.approx(alone["mean_nll"], abs=1e-4)
    assert value["mean_nll_se"] == pytest.approx(alone["standard_error"], abs=1e-4)
    assert (value["mean_kld"], value["same_top"]) == (0, 1)
    assert all(value[name] == alone[name] for name in ("tokens", "context", "stride", "windows"))


def test_bench_throughput_runs_more_sequences_than_fit_at_once(run: Run, engine: list[str]) -> None:
    sizes = ("--num-seqs", "3", "--prompt-tokens", "20", "--output-tokens", "6", "--repeats", "1")
    result = run("bench", "throughput", *engine, *sizes, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert value["prefill_tokens_per_s"] > 0
    assert value["decode_tokens_per_s"] > 0
    assert 0 <= value["kv_waste"] < 1
    assert value["host_ms_per_step"] > 0
    assert (value["recompilations"], value["prefix_hit_tokens"]) == (0, 0)


@pytest.mark.slow
def test_a_second_start_of_the_program_compiles_nothing(engine: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "atoma_jax.cli", "bench", "startup", *engine[:-1], "--json"]
    done = subprocess.run(
        [*command, "--num-iters-cold", "1", "--num-iters-warm", "1"],
        cwd=ROOT,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["cold"]["compile_cache_misses"][0] > 0
    assert value["warm"]["compile_cache_misses"] == [0]
    assert value["warm"]["compile_cache_hits"][0] > 0
    assert value["warm"]["phases_s"]["compile"] < value["cold"]["seconds_to_first_token"]["mean"]
