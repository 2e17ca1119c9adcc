"""Frequencies of rotary positions under every scaling that model files ask for. Knows no file and no model.

Frequencies are radians a position, one for each rotated pair of dimensions, in float64.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

_Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


def plain(theta: float, dims: int) -> _Array:
    """theta^(−2i/dims) (arXiv:2104.09864) for the `dims` dimensions of a head that rotate."""
    return theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)


def llama3(frequencies: _Array, *, factor: float, low: float, high: float, original: int) -> _Array:
    """Llama 3.1's scaling: long waves are stretched, short ones kept, those between blended.

    Args:
        frequencies: plain ones.
        factor: of the stretch.
        low: waves that fit the original context fewer than so many times are stretched in full.
        high: waves that fit it more often are kept.
        original: tokens of the context that the model was first trained on.
    """
    turns = original * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (smooth + (1 - smooth) / factor)


def yarn(
    theta: float,
    dims: int,
    *,
    factor: float,
    original: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> _Array:
    """YaRN (arXiv:2309.00071): pairs that turn often in the original context are kept, slow ones are stretched.

    Args:
        theta: base of the plain frequencies.
        dims: rotated dimensions.
        factor: of the stretch.
        original: tokens of the context that the model was first trained on.
        beta_fast: turns above which a pair is kept.
        beta_slow: turns below which it is stretched in full.
        truncate: round the borders between them to whole pairs.
    """

    def pair_that_turns(times: float) -> float:
        return dims * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    frequencies = plain(theta, dims)
    return frequencies * (1 - ramp) + frequencies / factor * ramp


def yarn_magnitude(factor: float, slope: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines by, unless the model says otherwise; `slope` is the paper's for 1."""
    return 1.0 if factor <= 1 else 0.1 * slope * math.log(factor) + 1.0


def longrope_magnitude(factor: float, original: int) -> float:
    """Likewise for LongRoPE (arXiv:2402.13753), whose frequencies are plain ones over factors from the file."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def as_tuple(frequencies: _Array | Sequence[float]) -> tuple[float, ...]:
    """For a `RopeSpec`."""
    return tuple(float(value) for value in frequencies)
