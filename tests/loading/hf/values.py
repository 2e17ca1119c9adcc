"""What tests of quantized checkpoints share: exact values, and what a tensor owes to them."""

from pathlib import Path

import ml_dtypes
import numpy as np

from atoma_jax.loading.checkpoint import StoredTensor
from atoma_jax.loading.hf.checkpoint import HFCheckpoint
from atoma_jax.quant.groups import GroupCodes

ROWS = (slice(None), slice(3, 21), slice(8, 16), slice(5, 5), np.array([40, 3, 3, 11, 0]))


def random_scales(*shape: int, dtype: object = np.float16) -> np.ndarray:
    """Of both signs, some subnormal, with all their bits in use."""
    rng = np.random.default_rng(1)
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-18, 2, shape)).astype(dtype)


def exact(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | float, groups: np.ndarray) -> np.ndarray:
    """s(q − z) in float64, rounded once; `groups` is the group of each input."""
    spread = [np.asarray(factor, np.float64)[:, groups] if np.ndim(factor) else factor for factor in (scales, zeros)]
    return (spread[0] * (codes.astype(np.float64) - spread[1])).astype(np.float32)


def assert_tensor_is(tensor: StoredTensor, values: np.ndarray, **facts: object) -> None:
    """A quantized tensor decodes to the values, for any rows, as does its face."""
    assert tensor.shape == values.shape
    assert tensor.format is not None
    for name, value in facts.items():
        assert getattr(tensor if hasattr(tensor, name) else tensor.format, name) == value, name
    for rows in ROWS:
        np.testing.assert_array_equal(tensor.dequantize(rows), values[rows], strict=True)
        decoded = tensor.decode(rows)
        assert decoded.format == tensor.format
        assert decoded.codes.max(initial=0) < 2**tensor.format.bits
        stored = values[rows] if tensor.permutation is None else values[rows][:, tensor.permutation]
        np.testing.assert_array_equal(decoded.values(), stored, strict=True)
        np.testing.assert_array_equal(of_signed_numbers(decoded), stored)  # what the rows layout keeps
        assert decoded.scales.values.shape == (len(stored), values.shape[1] // tensor.format.group)
        in_type = decoded.scales.values.astype(tensor.format.scale_dtype).astype(np.float32)
        np.testing.assert_array_equal(in_type, decoded.scales.values)  # the declared type holds them


def of_signed_numbers(decoded: GroupCodes) -> np.ndarray:
    """The values from numbers in a byte each, without zero points."""
    by_group = (*decoded.scales.values.shape, decoded.format.group)
    numbers = decoded.signed()
    if decoded.format.float_codes:
        numbers = numbers.view(ml_dtypes.float8_e4m3fn)
    values = numbers.astype(np.float32).reshape(by_group) * decoded.scales.flat()[..., None]
    if decoded.mins is not None:
        values -= decoded.mins.flat()[..., None]
    return values.reshape(decoded.codes.shape)


def opened(folder: Path) -> StoredTensor:
    """The one weight of a folder."""
    tensors = HFCheckpoint.open(folder).tensors
    assert list(tensors) == ["x.weight"]
    return tensors["x.weight"]
