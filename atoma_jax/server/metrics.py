"""Prometheus metrics, under the names of existing dashboards. Plain numbers until a scrape makes families of them.

What the engine counts in its own thread (steps, tokens, gaps between tokens) comes as one reading of `AsyncLLM.stats`;
what concerns whole requests is counted here, in the server's loop alone.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from atoma_jax import AsyncLLM, EngineConfig, EngineDeadError, EngineStats, RequestOutput, SamplingParams
from atoma_jax.histogram import Distribution, Histogram

STATS_TIMEOUT = 2.0  # seconds that a scrape waits for the end of a step; then it gets the reading before

_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TPOT = (
    *(0.001, 0.002, 0.004, 0.006, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_LENGTH = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))  # tokens
_FEW = (1.0, 2.0, 5.0, 10.0, 20.0)

# name, help, buckets
_REQUEST_HISTOGRAMS = (
    ("time_to_first_token_seconds", "From arrival until the first token.", _TTFT),
    ("request_time_per_output_token_seconds", "Mean of a request's tokens after the first.", _TPOT),
    ("e2e_request_latency_seconds", "From arrival until the last token.", _LATENCY),
    ("request_queue_time_seconds", "From arrival until a step held the request.", _LATENCY),
    ("request_inference_time_seconds", "From there until the last token.", _LATENCY),
    ("request_prefill_time_seconds", "From there until the first token.", _LATENCY),
    ("request_decode_time_seconds", "From the first token until the last one.", _LATENCY),
    ("request_prompt_tokens", "Tokens of a prompt.", _LENGTH),
    ("request_generation_tokens", "Tokens of an answer, over all samples.", _LENGTH),
    ("request_params_n", "Samples asked for.", _FEW),
    ("request_params_max_tokens", "Tokens asked for at most.", _LENGTH),
    ("request_num_preemptions", "How often a request lost its pages.", (0.0, *_FEW)),
)
FINISH_REASONS: tuple[str, ...] = ("stop", "length", "abort", "error")
REJECTIONS: tuple[str, ...] = ("queue_full", "queue_timeout", "unavailable")


class Metrics:
    """What is counted, and its exposition."""

    def __init__(self, model_name: str):
        """`model_name` is the label of everything."""
        self.labels = {"model_name": model_name, "engine": "0"}
        self._requests = {name: Histogram(bounds) for name, _, bounds in _REQUEST_HISTOGRAMS}
        self._finished = Counter(dict.fromkeys(FINISH_REASONS, 0))
        self._rejections = Counter(dict.fromkeys(REJECTIONS, 0))
        self._llm: AsyncLLM | None = None
        self._config: EngineConfig | None = None
        self._last: EngineStats | None = None
        self._ready_at = 0.0

    def start(self, llm: AsyncLLM, config: EngineConfig) -> None:
        """The engine is there."""
        self._llm, self._config, self._ready_at = llm, config, time.time()

    def add_request(self, output: RequestOutput, params: SamplingParams | None) -> None:
        """A prompt is done; one that became a vector had no `params`."""
        for sample in output.outputs:
            self.count_finished(sample.finish_reason or "abort")
        times = output.metrics
        assert times is not None, "the engine fills the metrics of every output"
        inference = None
        if times.finished_time is not None and times.first_scheduled_time is not None:
            inference = times.finished_time - times.first_scheduled_time
        values: dict[str, float | None] = {
            "time_to_first_token_seconds": times.time_to_first_token,
            "request_time_per_output_token_seconds": times.time_per_output_token,
            "e2e_request_latency_seconds": times.e2e_time,
            "request_queue_time_seconds": times.queue_time,
            "request_inference_time_seconds": inference,
            "request_prefill_time_seconds": times.prefill_time,
            "request_decode_time_seconds": times.decode_time,
            "request_prompt_tokens": float(len(output.prompt_token_ids)),
            "request_generation_tokens": float(times.num_generation_tokens),
            "request_params_n": None if params is None else float(params.n),
            "request_params_max_tokens": None if params is None else _float(params.max_tokens),
            "request_num_preemptions": float(times.num_preemptions),
        }
        for name, value in values.items():
            if value is not None:
                self._requests[name].add(value)

    def count_finished(self, reason: str) -> None:
        """A sample ended."""
        self._finished[reason] += 1

    def count_rejection(self, reason: str) -> None:
        """A request was turned away, or given up before its first step."""
        self._rejections[reason] += 1

    async def read_engine(self) -> EngineStats | None:
        """The engine's counts; the last known ones where it is lost or hangs."""
        if self._llm is not None:
            with suppress(TimeoutError, EngineDeadError):
                self._last = await asyncio.wait_for(self._llm.stats(), STATS_TIMEOUT)
        return self._last

    async def exposition(self) -> bytes:
        """The text of `/metrics`."""
        stats = await self.read_engine()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families([*self._of_requests(), *self._of_start(), *self._of_engine(stats)]))
        return generate_latest(registry)

    def _of_requests(self) -> Iterator[Metric]:
        for name, text, _ in _REQUEST_HISTOGRAMS:
            yield self._histogram(f"vllm:{name}", text, self._requests[name].read())
        yield self._counter("vllm:request_success", "Samples by how they ended.", self._finished, "finished_reason")
        yield self._counter("vllm:admission_rejections", "Requests turned away.", self._rejections, "reason")

    def _of_start(self) -> Iterator[Metric]:
        if self._llm is None or self._config is None:
            return
        start, limits = self._llm.startup, self._llm.model_config
        cache = {
            "block_size": limits.page_size,
            "num_gpu_blocks": limits.num_pages,
            "cache_dtype": self._config.cache.kv_cache_dtype,
            "enable_prefix_caching": self._config.cache.enable_prefix_caching,
        }
        info = InfoMetricFamily("vllm:cache_config", "The KV cache.", labels=list(self.labels))
        info.add_metric(list(self.labels.values()), {name: str(value) for name, value in cache.items()})
        yield info
        phases = GaugeMetricFamily(
            "atoma:startup_phase_seconds", "Seconds of each phase of the start.", labels=[*self.labels, "phase"]
        )
        for phase, seconds in start.phases.items():
            phases.add_metric([*self.labels.values(), phase], seconds)
        yield phases
        yield self._gauge("atoma:startup_time_seconds", "Seconds of the whole start.", start.total)
        yield self._gauge("atoma:ready_timestamp_seconds", "When the engine was ready.", self._ready_at)
        yield self._gauge("atoma:kv_cache_memory_bytes", "Bytes of the KV cache.", limits.kv_cache_bytes)
        yield self._gauge("atoma:weight_memory_bytes", "Bytes of the weights.", limits.weight_bytes)
        hits, misses = start.compile_cache_hits, start.compile_cache_misses
        programs = {"hit": hits, "miss": misses}
        yield self._counter("atoma:compile_cache", "Programs of the start, found compiled or not.", programs, "result")

    def _of_engine(self, stats: EngineStats | None) -> Iterator[Metric]:
        if stats is None:
            return
        for name, text, value in (
            ("vllm:num_requests_running", "Sequences in the steps.", stats.num_running),
            ("vllm:num_requests_waiting", "Sequences that wait.", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of the pages in use, 1 for all.", stats.kv_usage),
            ("atoma:kv_cache_waste_ratio", "Share of the pages in use that holds nothing.", stats.kv_waste_now),
            ("vllm:engine_sleep_state", "Always 0: there is no sleep mode.", 0),
        ):
            yield self._gauge(name, text, value)
        for name, text, count in (
            ("vllm:num_preemptions", "Sequences that lost their pages.", stats.preemptions),
            ("vllm:prompt_tokens", "Tokens of prompts taken in.", stats.prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens),
            ("vllm:prompt_tokens_cached", "Tokens of prompts found in the prefix cache.", stats.prefix_hit_tokens),
            ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_queried_tokens),
            ("vllm:prefix_cache_hits", "Those found.", stats.prefix_hit_tokens),
            ("atoma:recompilations", "Programs compiled after the start: 0 unless something is wrong.",
             stats.recompilations),
            ("atoma:steps", "Steps of the engine.", stats.steps),
        ):  # fmt: skip
            yield self._counter(name, text, {None: count}, None)
        for name, text, distribution in (
            ("vllm:inter_token_latency_seconds", "Between steps that brought tokens.", stats.inter_token_seconds),
            ("vllm:iteration_tokens_total", "Positions of a step.", stats.step_tokens),
            ("atoma:step_host_seconds", "A step's time on the host.", stats.host_step_seconds),
            ("atoma:step_device_seconds", "A step's wait for the device.", stats.device_step_seconds),
        ):
            yield self._histogram(name, text, distribution)

    def _gauge(self, name: str, text: str, value: int | float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family

    def _counter(self, name: str, text: str, counts: Mapping[Any, int], label: str | None) -> Metric:
        family = CounterMetricFamily(name, text, labels=[*self.labels, *([] if label is None else [label])])
        for value, count in counts.items():
            family.add_metric([*self.labels.values(), *([] if label is None else [value])], count)
        return family

    def _histogram(self, name: str, text: str, values: Distribution) -> Metric:
        family = HistogramMetricFamily(name, text, labels=list(self.labels))
        buckets: list[tuple[str, float]] = []
        below = 0
        for bound, count in zip((*map(str, values.bounds), "+Inf"), values.counts, strict=True):
            below += count
            buckets.append((bound, below))
        family.add_metric(list(self.labels.values()), buckets, values.total)
        return family


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]):
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _float(number: int | None) -> float | None:
    return None if number is None else float(number)
