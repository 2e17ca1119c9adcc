"""Counts by size, as Prometheus has them: cheap enough for every token, copied in one go. One thread adds."""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Distribution:
    """A reading of a histogram.

    Attributes:
        bounds: rising upper limits of the buckets, each of which counts; above the last there is one bucket more.
        counts: values in each bucket alone, one more than bounds.
        total: sum of the values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """Values in all."""
        return sum(self.counts)


class Histogram:
    """Adds up values by size."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Iterable[float]):
        """`bounds` are the buckets' upper limits, rising."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Counts a value, or several equal ones."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._total += value * count

    def read(self) -> Distribution:
        """What was counted so far."""
        return Distribution(self._bounds, tuple(self._counts), self._total)
