"""Throughput: many sequences at once, all queued before the first step.

Definitions, over one run of S sequences of P prompt and O output tokens each. The clock starts at the first step.

- prefill phase: until every sequence has its first token. `prefill_tokens_per_s` = S·P / its length. Sequences that are
  through with their prompt decode in the same steps, so the number is a lower bound of the prefill alone.
- decode phase: from there until the last token. `decode_tokens_per_s` = tokens that came in it / its length.
- `output_tokens_per_s` = S·O / both together; `total_tokens_per_s` counts the prompts in.
- TTFT of a sequence: from the start of the clock to its first token. TPOT: (last token − first token) / (O − 1).

Where S is above the engine's max_num_seqs, later sequences wait, and the prefill phase holds their wait.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from atoma_jax.benchmarks.machine import peak_rss_bytes
from atoma_jax.benchmarks.protocol import BenchEngine, Stats, StepEngine
from atoma_jax.benchmarks.statistics import median, summary
from atoma_jax.benchmarks.workload import check_lengths, random_prompts
from atoma_jax.sampling_params import RequestOutputKind, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputWorkload:
    """What is run, and how often. Prompts of every run are new, so the prefix cache never answers."""

    num_seqs: int = 16
    prompt_tokens: int = 128
    output_tokens: int = 64
    repeats: int = 3
    warmup: int = 1  # runs before, not counted
    seed: int = 0  # of the prompts
    temperature: float = 0.0  # as the following, a setting of every request's sampling
    top_k: int = 0
    top_p: float = 1.0
    logprobs: int | None = None

    def params(self) -> SamplingParams:
        """Of every request.

        Raises:
            ParameterError: a setting is outside its limits.
        """
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            logprobs=self.logprobs,
            max_tokens=self.output_tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputRun:
    """One run's times, in seconds from its first step, and counters."""

    prompt_tokens: int  # of all sequences
    output_tokens: int  # of all sequences
    prefill_seconds: float  # length of the prefill phase
    total_seconds: float
    decode_phase_tokens: int  # tokens that came after the prefill phase
    ttft_seconds: tuple[float, ...]
    tpot_seconds: tuple[float, ...]
    steps: int
    host_seconds: float
    device_seconds: float
    kv_waste: float
    peak_kv_usage: float
    preemptions: int
    prefix_hit_tokens: int
    recompilations: int

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens a second of the prefill phase."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens a second of the decode phase; None where all outputs end with their first token."""
        if not self.decode_phase_tokens:
            return None
        return self.decode_phase_tokens / (self.total_seconds - self.prefill_seconds)

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens a second of the whole run."""
        return self.output_tokens / self.total_seconds


def measure_throughput(llm: BenchEngine, work: ThroughputWorkload) -> dict[str, Any]:
    """Runs the workload; medians over the repeats as keys of a JSON object, the repeats themselves under `runs`.

    Raises:
        ParameterError: prompt and output do not fit into the model, or sampling has a setting outside its limits.
    """
    check_lengths(llm, prompt_tokens=work.prompt_tokens, output_tokens=work.output_tokens)
    runs = [_run(llm, work, seed=work.seed + number) for number in range(work.warmup + work.repeats)][work.warmup :]
    return {
        "num_seqs": work.num_seqs,
        "prompt_tokens": work.prompt_tokens,
        "output_tokens": work.output_tokens,
        "repeats": work.repeats,
        "temperature": work.temperature,
        "top_k": work.top_k,
        "top_p": work.top_p,
        "logprobs": work.logprobs,
        "prefill_tokens_per_s": median([run.prefill_tokens_per_s for run in runs]),
        "decode_tokens_per_s": median([run.decode_tokens_per_s for run in runs]),
        "output_tokens_per_s": median([run.output_tokens_per_s for run in runs]),
        "total_tokens_per_s": median([(run.prompt_tokens + run.output_tokens) / run.total_seconds for run in runs]),
        "total_seconds": median([run.total_seconds for run in runs]),
        "ttft_s": summary([ttft for run in runs for ttft in run.ttft_seconds]),
        "tpot_s": summary([tpot for run in runs for tpot in run.tpot_seconds]),
        "host_ms_per_step": 1e3 * sum(run.host_seconds for run in runs) / sum(run.steps for run in runs),
        "device_ms_per_step": 1e3 * sum(run.device_seconds for run in runs) / sum(run.steps for run in runs),
        "kv_waste": median([run.kv_waste for run in runs]),
        "peak_kv_usage": max(run.peak_kv_usage for run in runs),
        "preemptions": sum(run.preemptions for run in runs),
        "prefix_hit_tokens": sum(run.prefix_hit_tokens for run in runs),
        "recompilations": sum(run.recompilations for run in runs),
        "peak_rss_bytes": peak_rss_bytes(),
        "runs": [
            {
                "prefill_tokens_per_s": run.prefill_tokens_per_s,
                "decode_tokens_per_s": run.decode_tokens_per_s,
                "output_tokens_per_s": run.output_tokens_per_s,
                "total_seconds": run.total_seconds,
            }
            for run in runs
        ],
    }


def _run(llm: BenchEngine, work: ThroughputWorkload, *, seed: int) -> ThroughputRun:
    prompts = random_prompts(llm.get_tokenizer(), count=work.num_seqs, length=work.prompt_tokens, seed=seed)
    params = work.params()
    for number, prompt in enumerate(prompts):
        llm.llm_engine.add_request(f"throughput-{number}", {"prompt_token_ids": prompt}, params)
    llm.reset_stats()
    return time_run(llm.llm_engine, llm.stats, prompt_tokens=work.num_seqs * work.prompt_tokens)


def time_run(engine: StepEngine, stats: Callable[[], Stats], *, prompt_tokens: int) -> ThroughputRun:
    """Steps the engine until all that is queued is done. Requests must ask for DELTA outputs and one sample each.

    Args:
        engine: with the requests queued.
        stats: reads its counters, which were reset before.
        prompt_tokens: of all requests together.
    """
    begin = time.perf_counter()
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    counts: dict[str, int] = {}
    arrivals: list[tuple[float, int]] = []
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter() - begin
        for output in outputs:
            new = len(output.outputs[0].token_ids)
            if new:
                first.setdefault(output.request_id, now)
                last[output.request_id] = now
                counts[output.request_id] = counts.get(output.request_id, 0) + new
                arrivals.append((now, new))
    prefill = max(first.values())
    reading = stats()
    return ThroughputRun(
        prompt_tokens=prompt_tokens,
        output_tokens=sum(counts.values()),
        prefill_seconds=prefill,
        total_seconds=max(last.values()),
        decode_phase_tokens=sum(new for when, new in arrivals if when > prefill),
        ttft_seconds=tuple(first.values()),
        tpot_seconds=tuple((last[name] - first[name]) / (counts[name] - 1) for name in first if counts[name] > 1),
        steps=reading.steps,
        host_seconds=reading.host_seconds,
        device_seconds=reading.device_seconds,
        kv_waste=reading.kv_waste,
        peak_kv_usage=reading.peak_kv_usage,
        preemptions=reading.preemptions,
        prefix_hit_tokens=reading.prefix_hit_tokens,
        recompilations=reading.recompilations,
    )
