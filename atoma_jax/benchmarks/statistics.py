"""How samples of a measurement are summed up."""

from collections.abc import Sequence
from typing import Any

import numpy as np

PERCENTILES = (10, 25, 50, 75, 90, 99)


def summary(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, standard deviation, extremes and percentiles in the unit of the samples; None where there are none."""
    if not values:
        return None
    samples = np.asarray(values, np.float64)
    return {
        "mean": float(samples.mean()),
        "std": float(samples.std()),
        "min": float(samples.min()),
        "max": float(samples.max()),
        **{f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(samples, PERCENTILES), strict=True)},
    }


def median(values: Sequence[float | None]) -> float | None:
    """The median of the samples that are there; None where there are none."""
    present = [value for value in values if value is not None]
    return float(np.median(present)) if present else None
