"""`/metrics`: the names that dashboards know, and numbers that add up."""

import asyncio
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import Serve, Served

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "engine_sleep_state")
COUNTERS = (
    *("num_preemptions", "prompt_tokens", "generation_tokens", "prompt_tokens_cached", "prefix_cache_queries"),
    *("prefix_cache_hits", "request_success", "admission_rejections"),
)
HISTOGRAMS = (
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens"),
    *("request_generation_tokens", "request_params_n", "request_params_max_tokens", "iteration_tokens_total"),
    *("request_num_preemptions",),
)
OURS = (
    *("recompilations", "startup_phase_seconds", "startup_time_seconds", "kv_cache_waste_ratio", "step_host_seconds"),
    *("step_device_seconds", "compile_cache", "kv_cache_memory_bytes", "weight_memory_bytes", "steps"),
)


def samples(server: Served) -> dict[str, float]:
    """Values by name and the labels that differ."""
    response = server.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == "tiny"
            assert sample.labels.pop("engine") == "0"
            values[" ".join([sample.name, *sample.labels.values()])] = sample.value
    return values


def test_every_name_of_the_dashboards_is_there(server: Served) -> None:
    kinds = {family.name: family.type for family in text_string_to_metric_families(server.get("/metrics").text)}
    assert {name: kinds.get(f"vllm:{name}") for name in GAUGES} == dict.fromkeys(GAUGES, "gauge")
    assert {name: kinds.get(f"vllm:{name}") for name in COUNTERS} == dict.fromkeys(COUNTERS, "counter")
    assert {name: kinds.get(f"vllm:{name}") for name in HISTOGRAMS} == dict.fromkeys(HISTOGRAMS, "histogram")
    assert {name for name in OURS if f"atoma:{name}" not in kinds} == set()
    assert "vllm:cache_config_info" in server.get("/metrics").text


def test_what_was_served_is_counted(server: Served) -> None:
    server.complete(prompt=list(range(10, 43)), **GREEDY)
    server.complete(prompt=list(range(10, 43)), **GREEDY)
    server.post("/v1/completions", {"prompt": [5], "stream": True, **GREEDY, "n": 2})
    values = samples(server)
    assert values["vllm:prompt_tokens_total"] == 33 + 33 + 1
    assert values["vllm:generation_tokens_total"] == 6 * 4
    assert values["vllm:prefix_cache_hits_total"] == 32
    assert values["vllm:request_success_total length"] == 4
    assert values["vllm:request_success_total abort"] == 0
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_decode_time_seconds"):
        assert values[f"vllm:{name}_count"] == 3
        assert values[f"vllm:{name}_bucket +Inf"] == 3
        assert values[f"vllm:{name}_sum"] > 0
    assert values["vllm:request_prompt_tokens_sum"] == 67
    assert values["vllm:request_generation_tokens_sum"] == 24
    assert 5 * 3 <= values["vllm:inter_token_latency_seconds_count"] <= 5 * 3 + 3  # two samples may be steps apart
    assert values["vllm:iteration_tokens_total_sum"] >= 33 + 1 + 1 + 5 * 4
    assert values["atoma:recompilations_total"] == 0
    assert values["atoma:step_host_seconds_count"] == values["atoma:steps_total"]
    assert values["vllm:num_requests_running"] == values["vllm:kv_cache_usage_perc"] == 0


def test_labels_do_not_grow_with_what_clients_send(server: Served) -> None:
    before = set(samples(server))
    for index in range(5):
        server.refused("/v1/completions", {"prompt": "a", "model": f"m{index}"}, 404)
        server.get(f"/path{index}")
        server.complete(prompt="a", user=f"u{index}", max_tokens=1)
    assert set(samples(server)) == before


def test_a_scrape_while_the_device_hangs_gets_the_last_reading(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atoma_jax.server.metrics.STATS_TIMEOUT", 0.05)
    server = serve()
    server.complete(prompt="a", **GREEDY)
    assert samples(server)["vllm:generation_tokens_total"] == 6
    gate = threading.Event()

    def hold() -> None:
        gate.wait(20)

    server.llm._call(hold)

    async def main() -> str:
        async with server.client() as client:
            return (await client.get("/metrics")).text

    text = asyncio.run(main())
    gate.set()
    assert re.search(r"vllm:generation_tokens_total\{.*\} 6.0", text)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's package prometheus) is not installed")
def test_promtool_has_nothing_against_it(server: Served) -> None:
    server.complete(prompt="a", **GREEDY)
    text = server.get("/metrics").content
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert done.returncode in (0, 3), done.stderr.decode()  # 3: only matters of taste
    theirs = (  # the names of existing dashboards
        "metric names should not contain ':'",
        'vllm:iteration_tokens_total non-counter metrics should not have "_total" suffix',
    )
    assert [line for line in done.stderr.decode().splitlines() if not line.endswith(theirs)] == []


def test_the_dashboard_asks_for_names_that_exist(server: Served) -> None:
    text = server.get("/metrics").text
    folder = Path(__file__).parents[2] / "configs" / "serve" / "monitoring"
    asked = set(re.findall(r"(?:vllm|atoma):\w+", (folder / "grafana" / "dashboard.json").read_text(encoding="utf-8")))
    assert len(asked) > 15
    assert {name for name in asked if not re.search(rf"^{name}\b", text, re.MULTILINE)} == set()
