"""What a run of requests amounts to, under the keys of vLLM's `bench serve`, so that tools which read its files go on.

Definitions. TTFT: from sending a request to its first text. E2EL: to its last. TPOT: (E2EL − TTFT) / (tokens − 1). ITL:
each gap between two pieces of text. Goodput: requests a second that keep every limit asked for. `duration` is from the
first request sent to the end of the last. Failed requests are counted, and enter no time and no number of tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from atoma_jax.benchmarks.serve.client import Outcome

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")  # those of one request

Limits = Mapping[str, float]  # milliseconds by metric


def result_of(
    outcomes: Sequence[Outcome], *, duration: float, limits: Limits, percentiles: Sequence[float], detail: bool
) -> dict[str, Any]:
    """The measured keys.

    Args:
        outcomes: of all requests, failed ones too.
        duration: seconds.
        limits: of `GOODPUT_METRICS`; empty: no goodput is counted.
        percentiles: those shown of each metric.
        detail: also one entry for each request.
    """
    done = [outcome for outcome in outcomes if not outcome.error]
    prompt = sum(outcome.prompt_tokens for outcome in done)
    output = sum(outcome.output_tokens for outcome in done)
    samples = {
        "ttft": [outcome.ttft for outcome in done],
        "tpot": [outcome.tpot for outcome in done if outcome.tpot is not None],
        "itl": [gap for outcome in done for gap in outcome.itls],
        "e2el": [outcome.latency for outcome in done],
    }
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(done) / duration,
        "request_goodput": sum(_keeps(outcome, limits) for outcome in done) / duration if limits else None,
        "output_throughput": output / duration,
        "total_token_throughput": (prompt + output) / duration,
        "max_output_tokens_per_s": _peak_rate(done),
        "max_concurrent_requests": _peak_concurrency(done),
    }
    for name in METRICS:
        result |= _spread(name, samples[name], percentiles)
    if detail:
        result |= {
            "input_lens": [outcome.prompt_tokens for outcome in outcomes],
            "output_lens": [outcome.output_tokens for outcome in outcomes],
            "ttfts": [0.0 if outcome.error else outcome.ttft for outcome in outcomes],
            "itls": [[] if outcome.error else outcome.itls for outcome in outcomes],
            "generated_texts": [outcome.text for outcome in outcomes],
            "errors": [outcome.error for outcome in outcomes],
        }
    return result


def _keeps(outcome: Outcome, limits: Limits) -> bool:
    """Whether a request keeps every limit. One token alone has no time per further token to keep."""
    values = {"ttft": outcome.ttft, "tpot": outcome.tpot or 0.0, "e2el": outcome.latency}
    return all(values[name] * 1e3 <= limit for name, limit in limits.items())


def _spread(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, standard deviation and percentiles in milliseconds; None where there is no sample."""
    names = ["mean", "median", "std", *(f"p{percentile:g}" for percentile in percentiles)]
    if not seconds:
        return {f"{kind}_{name}_ms": None for kind in names}
    values = np.asarray(seconds, np.float64) * 1e3
    numbers = [values.mean(), np.median(values), values.std(), *np.percentile(values, percentiles)]
    return {f"{kind}_{name}_ms": float(number) for kind, number in zip(names, numbers, strict=True)}


def _peak_rate(done: Sequence[Outcome]) -> float:
    """The most tokens in one whole second from the first request on; a request's tokens are even over its pieces."""
    if not done:
        return 0.0
    begin = min(outcome.start for outcome in done)
    moments = np.concatenate([np.asarray(outcome.arrivals) for outcome in done]) - begin
    weights = np.concatenate(
        [np.full(len(outcome.arrivals), outcome.output_tokens / len(outcome.arrivals)) for outcome in done]
    )
    return float(np.bincount(moments.astype(np.int64), weights).max())


def _peak_concurrency(done: Sequence[Outcome]) -> int:
    """The most requests between their sending and their last text; failed ones, whose end has no time, are left out."""
    changes = sorted(
        [(outcome.start, 1) for outcome in done] + [(outcome.arrivals[-1], -1) for outcome in done],
    )
    present = peak = 0
    for _, change in changes:
        present += change
        peak = max(peak, present)
    return peak
