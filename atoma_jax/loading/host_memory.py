"""Memory on the host that arrays on the device begin in."""

import math
from typing import Any

import numpy as np

XLA_ALIGNMENT = 64  # bytes


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, np.dtype[Any]]:
    """An array without values whose memory XLA:CPU takes over as it is; it would copy one that starts elsewhere."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + XLA_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % XLA_ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)
