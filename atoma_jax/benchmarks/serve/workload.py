"""What `bench serve` sends, at which moments, and what is counted. Sends nothing, and needs nothing of the extra."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from atoma_jax.benchmarks.serve.lengths import RandomLengths

Dataset = Literal["random", "sharegpt-like", "sharegpt"]
Sweep = Literal["request_rate", "max_concurrency"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How requests are spread over time.

    Gaps between them are gamma distributed with shape `burstiness` and mean 1 / `request_rate`: 1 makes a Poisson
    process, less makes bursts, more an even row.
    """

    request_rate: float = float("inf")  # requests a second; inf: all at once
    burstiness: float = 1.0
    max_concurrency: int | None = None  # unanswered ones; further ones wait, and their clock stands still until then
    seed: int = 0  # of the gaps

    def moments(self, count: int) -> list[float]:
        """Seconds from the start at which requests are due; the first is due at once."""
        if self.request_rate == float("inf"):
            return [0.0] * count
        scale = 1 / (self.request_rate * self.burstiness)
        gaps = np.random.default_rng(self.seed).gamma(self.burstiness, scale, size=max(0, count - 1))
        return [0.0, *np.cumsum(gaps).tolist()][:count]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeWorkload:
    """What is sent, how fast, and what is counted."""

    base_url: str = "http://127.0.0.1:8000"
    api_key: str | None = None
    model: str | None = None  # None: the first that the server names
    chat: bool = False
    dataset: Dataset = "random"
    dataset_path: Path | None = None  # of sharegpt
    num_prompts: int = 100
    lengths: RandomLengths = field(default_factory=RandomLengths)
    prefix_len: int = 0  # of random prompts: tokens that all begin with
    sharegpt_output_len: int | None = None
    pace: Pace = field(default_factory=Pace)
    num_warmups: int = 1
    seed: int = 0
    timeout: float = 600.0  # seconds without a byte
    body: dict[str, Any] = field(default_factory=lambda: dict[str, Any]())
    goodput: dict[str, float] = field(default_factory=lambda: dict[str, float]())
    percentiles: tuple[float, ...] = (99.0,)
    detail: bool = True
    label: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """One run for each value."""

    over: Sweep
    values: tuple[float, ...]

    def paces(self, pace: Pace) -> list[Pace]:
        """The pace of each run."""
        if self.over == "request_rate":
            return [replace(pace, request_rate=value) for value in self.values]
        return [replace(pace, max_concurrency=int(value)) for value in self.values]
