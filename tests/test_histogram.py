"""Counts by size, against numpy's."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from atoma_jax.histogram import Histogram

BOUNDS = (0.5, 1.0, 2.0, 8.0)


@given(st.lists(st.tuples(st.floats(-1, 20), st.integers(1, 5))))
def test_each_value_is_in_the_bucket_whose_bound_it_does_not_exceed(values: list[tuple[float, int]]) -> None:
    histogram = Histogram(BOUNDS)
    for value, count in values:
        histogram.add(value, count)
    read = histogram.read()
    flat = np.array([value for value, count in values for _ in range(count)], dtype=np.float64)
    below = [int((flat <= bound).sum()) for bound in (*BOUNDS, np.inf)]
    assert list(np.cumsum(read.counts)) == below
    assert read.count == len(flat)
    assert np.isclose(read.total, flat.sum())
