"""`atoma-jax bench` around a fake engine: the keys of the JSON objects, and what is refused."""

import json
from collections.abc import Callable

import pytest
from typer.testing import Result

from atoma_jax.benchmarks.startup import Start
from tests.cli.fake_engine import MAX_MODEL_LEN, FakeLLM

Run = Callable[..., Result]

EVERYWHERE = {
    *("model", "versions", "platform", "device", "num_devices", "cpu", "cpu_cores", "load_average", "date"),
}
STARTED = {"startup_s", "startup_phases_s", "kernels", "compile_cache_hits", "compile_cache_misses"}


def test_throughput(run: Run, fake_llm: type[FakeLLM]) -> None:
    sizes = ("--num-seqs", "3", "--prompt-tokens", "10", "--output-tokens", "5", "--repeats", "2", "--warmup", "1")
    result = run("bench", "throughput", "--model", "m", *sizes, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    value = json.loads(result.stdout)
    assert set(value) == EVERYWHERE | STARTED | {
        *("num_seqs", "prompt_tokens", "output_tokens", "repeats", "total_seconds", "runs"),
        *("temperature", "top_k", "top_p", "logprobs"),
        *("prefill_tokens_per_s", "decode_tokens_per_s", "output_tokens_per_s", "total_tokens_per_s"),
        *("ttft_s", "tpot_s", "host_ms_per_step", "device_ms_per_step", "kv_waste", "peak_kv_usage", "preemptions"),
        *("prefix_hit_tokens", "recompilations", "peak_rss_bytes"),
    }
    assert (value["num_seqs"], value["prompt_tokens"], value["output_tokens"], len(value["runs"])) == (3, 10, 5, 2)
    assert value["host_ms_per_step"] == pytest.approx(0.5)
    assert value["kv_waste"] == 0.02
    for one in value["runs"]:  # 3 × 10 tokens read, then 3 × 4 after each one's first
        assert 30 / one["prefill_tokens_per_s"] + 12 / one["decode_tokens_per_s"] == pytest.approx(one["total_seconds"])
        assert 15 / one["output_tokens_per_s"] == pytest.approx(one["total_seconds"])
    rates = [one["decode_tokens_per_s"] for one in value["runs"]]
    assert value["decode_tokens_per_s"] == pytest.approx(sum(rates) / 2)  # the median of two
    assert value["peak_rss_bytes"] > 1 << 20
    assert set(value["versions"]) == {"atoma_jax", "jax", "python"}
    assert "1 + 2 runs of 3 × (10 + 5) tokens" in result.stderr


def test_throughput_of_sampled_requests(run: Run, fake_llm: type[FakeLLM]) -> None:
    flags = ("--temperature", "0.8", "--top-k", "40", "--top-p", "0.95", "--logprobs", "5")
    result = run("bench", "throughput", "--model", "m", "--output-tokens", "5", *flags, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert (value["temperature"], value["top_k"], value["top_p"], value["logprobs"]) == (0.8, 40, 0.95, 5)
    asked = fake_llm.built[0].llm_engine.asked
    assert {(one.temperature, one.top_k, one.top_p, one.logprobs) for one in asked} == {(0.8, 40, 0.95, 5)}
    assert all(one.ignore_eos and one.max_tokens == 5 for one in asked)


def test_latency(run: Run, fake_llm: type[FakeLLM]) -> None:
    sizes = ("--input-len", "4", "--output-len", "6", "--batch-size", "2", "--num-iters", "5")
    result = run("bench", "latency", "--model", "m", *sizes, "--num-iters-warmup", "2", "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert set(value) == EVERYWHERE | STARTED | {
        *("input_len", "output_len", "batch_size", "num_iters", "avg_latency", "latencies", "percentiles"),
        *("ttft_s", "tpot_s", "peak_rss_bytes"),
    }
    assert len(value["latencies"]) == 5
    assert set(value["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert value["ttft_s"]["mean"] == pytest.approx(0.5)
    assert value["tpot_s"]["mean"] == pytest.approx(0.1)
    prompts = [tuple(prompt["prompt_token_ids"]) for prompt, _ in fake_llm.built[0].asked]
    assert len(prompts) == len(set(prompts)) == 7 * 2  # never the same one twice
    assert all(params.ignore_eos for _, params in fake_llm.built[0].asked)


def test_startup(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[str] = []

    def start(flags: list[str], cache: str) -> Start:
        assert flags == ["--model", "m", "--max-num-seqs", "2"]
        caches.append(cache)
        return Start(
            seconds=float(len(caches)),
            phases={"imports": 0.5, "weights": 1.0},
            compile_cache_hits=0,
            compile_cache_misses=4,
        )

    monkeypatch.setattr("atoma_jax.benchmarks.startup._start", start)
    iterations = ("--num-iters-cold", "2", "--num-iters-warm", "3")
    result = run("bench", "startup", "--model", "m", "--max-num-seqs", "2", *iterations, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert set(value) == EVERYWHERE | {"num_iters_cold", "num_iters_warm", "cold", "warm"}
    assert (value["cold"]["seconds_to_first_token"]["min"], value["cold"]["seconds_to_first_token"]["max"]) == (1, 2)
    assert value["warm"]["seconds_to_first_token"]["min"] == 4  # the third start fills the cache and does not count
    assert value["warm"]["phases_s"] == {"imports": 0.5, "weights": 1.0}
    assert len({caches[0], caches[1], caches[2]}) == 3
    assert set(caches[2:]) == {caches[2]}
    assert "cold: 1.00 s to the first token (imports 0.50, weights 1.00)" in result.stderr


def test_startup_passes_a_refusal_on(run: Run) -> None:
    result = run("bench", "startup", "--model", "absent.gguf", "--num-iters-cold", "1", "--num-iters-warm", "0")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "absent.gguf" in result.stderr


def test_for_people(run: Run, fake_llm: type[FakeLLM]) -> None:
    result = run("bench", "throughput", "--model", "m", "--num-seqs", "1", "--output-tokens", "1", "--repeats", "1")
    assert result.exit_code == 0, result.stderr
    assert "decode_tokens_per_s   -\n" in result.stdout  # one token each: nothing is decoded after the first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("throughput", "--prompt-tokens", "150", "--output-tokens", "51"), f"context length is {MAX_MODEL_LEN}"),
        (("latency", "--input-len", "150", "--output-len", "51"), f"context length is {MAX_MODEL_LEN}"),
        (("throughput", "--num-seqs", "0"), "Invalid value for '--num-seqs'"),
        (("throughput", "--top-p", "1.5"), "top_p"),
    ],
)
def test_what_cannot_be_ends_with_2(run: Run, fake_llm: type[FakeLLM], flags: tuple[str, ...], message: str) -> None:
    result = run("bench", *flags, "--model", "m")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
