"""The definitions of prefill and decode rates, on a loop whose clock is known; the random prompts."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from atoma_jax.benchmarks import throughput
from atoma_jax.benchmarks.statistics import median, summary
from atoma_jax.benchmarks.throughput import time_run
from atoma_jax.benchmarks.workload import random_prompts
from atoma_jax.outputs import CompletionOutput, RequestOutput

NO_STATS = SimpleNamespace(
    steps=0,
    host_seconds=0.0,
    device_seconds=0.0,
    kv_waste=0.0,
    peak_kv_usage=0.0,
    preemptions=0,
    prefix_hit_tokens=0,
    recompilations=0,
)


class ScriptedLoop:
    """Each step takes the seconds and gives the tokens that the script says: `(seconds, {request: tokens})`."""

    model_config = SimpleNamespace(max_model_len=100, max_num_seqs=2)

    def __init__(self, script: list[tuple[float, dict[str, int]]]):
        self.script = list(script)
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    @property
    def has_work(self) -> bool:
        return bool(self.script)

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None: ...

    def step(self) -> list[RequestOutput]:
        seconds, news = self.script.pop(0)
        self.now += seconds
        return [
            RequestOutput(
                request_id=name,
                prompt=None,
                prompt_token_ids=[],
                outputs=[CompletionOutput(index=0, text="", token_ids=[0] * count)],
                finished=False,
            )
            for name, count in news.items()
        ]


class OddVocabulary:
    """Every even id is special."""

    vocab_size = 5000
    special_ids = frozenset(range(0, 5000, 2))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise NotImplementedError


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., throughput.ThroughputRun]:
    def run(script: list[tuple[float, dict[str, int]]], prompt_tokens: int) -> throughput.ThroughputRun:
        loop = ScriptedLoop(script)
        monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=loop.clock))
        return time_run(loop, lambda: NO_STATS, prompt_tokens=prompt_tokens)

    return run


def test_rates_of_two_sequences_of_which_one_decodes_while_the_other_is_read(run: Any) -> None:
    result = run([(1.0, {"a": 1}), (1.0, {"a": 1, "b": 1}), (0.5, {"a": 1, "b": 1}), (0.5, {"b": 1})], 200)
    assert result.prefill_seconds == 2.0
    assert result.prefill_tokens_per_s == 100.0
    assert result.decode_phase_tokens == 3  # a's second token came in the prefill phase
    assert result.decode_tokens_per_s == 3.0
    assert (result.output_tokens, result.total_seconds, result.output_tokens_per_s) == (6, 3.0, 2.0)
    assert result.ttft_seconds == (1.0, 2.0)
    assert result.tpot_seconds == (0.75, 0.5)  # (2.5 - 1) / 2, (3 - 2) / 2


def test_steps_without_news_count_by_their_time(run: Any) -> None:
    result = run([(1.0, {}), (1.0, {"a": 1}), (1.0, {}), (1.0, {"a": 1})], 10)
    assert (result.prefill_tokens_per_s, result.decode_tokens_per_s) == (5.0, 0.5)


def test_one_token_each_has_no_decode_rate(run: Any) -> None:
    result = run([(1.0, {"a": 1, "b": 1})], 10)
    assert result.decode_tokens_per_s is None
    assert result.tpot_seconds == ()
    assert result.output_tokens_per_s == 2.0


def test_random_prompts_share_no_beginning_and_hold_no_special_token() -> None:
    vocabulary = OddVocabulary()
    prompts = random_prompts(vocabulary, count=16, length=40, seed=3)
    assert (len(prompts), {len(prompt) for prompt in prompts}) == (16, {40})
    assert all(token % 2 for prompt in prompts for token in prompt)
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 16  # the first page is never the same
    assert prompts == random_prompts(vocabulary, count=16, length=40, seed=3)
    assert prompts != random_prompts(vocabulary, count=16, length=40, seed=4)


def test_summary_is_numpys() -> None:
    values = [3.0, 1.0, 2.0, 10.0]
    result = summary(values)
    assert result is not None
    assert (result["mean"], result["min"], result["max"]) == (4.0, 1.0, 10.0)
    assert (result["p50"], result["p99"]) == (np.percentile(values, 50), np.percentile(values, 99))
    assert summary([]) is None
    assert (median([1.0, None, 3.0]), median([None])) == (2.0, None)
