"""Latency: how long a fixed batch takes from the call to the last token, again and again.

All prompts have the same length and all outputs too; the batch is handed over at once. `avg_latency`, `latencies` and
`percentiles` are seconds a batch; TTFT and TPOT are seconds of its requests, as `RequestMetrics` defines them.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from atoma_jax.benchmarks.machine import peak_rss_bytes
from atoma_jax.benchmarks.protocol import BenchEngine
from atoma_jax.benchmarks.statistics import PERCENTILES, summary
from atoma_jax.benchmarks.workload import check_lengths, random_prompts
from atoma_jax.outputs import RequestMetrics
from atoma_jax.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyWorkload:
    """One batch, and how often it is run. Prompts of every run are new, so the prefix cache never answers."""

    input_len: int = 32  # tokens
    output_len: int = 128  # tokens
    batch_size: int = 8
    num_iters_warmup: int = 3
    num_iters: int = 10
    seed: int = 0  # of the prompts


def measure_latency(llm: BenchEngine, work: LatencyWorkload) -> dict[str, Any]:
    """Runs the batches; the result as keys of a JSON object.

    Raises:
        ParameterError: prompt and output do not fit into the model.
    """
    check_lengths(llm, prompt_tokens=work.input_len, output_tokens=work.output_len)
    params = SamplingParams(temperature=0, max_tokens=work.output_len, ignore_eos=True)
    latencies: list[float] = []
    metrics: list[RequestMetrics] = []
    for number in range(work.num_iters_warmup + work.num_iters):
        ids = random_prompts(llm.get_tokenizer(), count=work.batch_size, length=work.input_len, seed=work.seed + number)
        begin = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in ids], params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        if number >= work.num_iters_warmup:
            latencies.append(seconds)
            metrics += [output.metrics for output in outputs if output.metrics is not None]
    return {
        "input_len": work.input_len,
        "output_len": work.output_len,
        "batch_size": work.batch_size,
        "num_iters": work.num_iters,
        "avg_latency": float(np.mean(latencies)),
        "latencies": latencies,
        "percentiles": {str(p): float(np.percentile(latencies, p)) for p in PERCENTILES},
        "ttft_s": summary([m.time_to_first_token for m in metrics if m.time_to_first_token is not None]),
        "tpot_s": summary([m.time_per_output_token for m in metrics if m.time_per_output_token is not None]),
        "peak_rss_bytes": peak_rss_bytes(),
    }
