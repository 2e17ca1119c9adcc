"""Quantizing to ggml's types: the same bytes as ggml, whatever the weights look like and however they are cut up."""

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest

from atoma_jax.errors import UserError
from atoma_jax.quant.ggml_types import BLOCK_SIZES, GGMLType
from atoma_jax.quant.quantizers import QUANTIZERS, quantize

PLAIN = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
TYPES = sorted(QUANTIZERS)
K = 512


def reference(values: np.ndarray, ggml_type: GGMLType) -> np.ndarray:
    """libgguf's bytes, which are ggml's; of plain floats, which it leaves alone, the gguf package's."""
    if ggml_type in PLAIN:
        plain = gguf.quants.quantize(values, gguf.GGMLQuantizationType(ggml_type))
        return np.ascontiguousarray(plain).view(np.uint8).reshape(len(values), -1)
    libgguf = pytest.importorskip("libgguf", reason="libgguf has wheels for Linux on x86-64 only")
    raw = libgguf.quantize_rows_raw(int(ggml_type), values, *values.shape)
    return np.frombuffer(raw, np.uint8).reshape(len(values), -1)


def weights(kind: str, rows: int = 24, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (rows, K)
    values = {
        "normal": lambda: rng.normal(0, 0.02, shape),
        "heavy-tailed": lambda: rng.standard_t(2.5, shape) * 0.01,
        "uniform": lambda: rng.uniform(-1, 1, shape),
        "positive": lambda: rng.uniform(0, 1, shape),
        "negative": lambda: rng.uniform(-1, -0.5, shape),
        "sparse": lambda: rng.normal(0, 0.02, shape) * (rng.random(shape) < 0.05),  # zeros of both signs
        "ternary": lambda: rng.integers(-1, 2, shape) * 0.037,
        "integers": lambda: rng.integers(-8, 8, shape),  # ties
        "a few outliers": lambda: rng.normal(0, 1e-3, shape) * np.where(rng.random(shape) < 0.01, 1000, 1),
        "of every size": lambda: rng.normal(0, 1, shape) * 10.0 ** rng.integers(-20, 4, (rows, 1)),
        "mixed within a block": lambda: (
            rng.normal(0, 1, shape) * 10.0 ** rng.integers(-12, 3, (rows, K // 16, 1)).repeat(16, axis=2).reshape(shape)
        ),
        "subnormal": lambda: rng.normal(0, 1e-40, shape),
        "constant": lambda: np.full(shape, -0.3),
        "zero": lambda: np.zeros(shape),
        "nothing but −0": lambda: np.full(shape, -0.0),
    }[kind]()
    return values.astype(np.float32)


KINDS = (
    "normal",
    "heavy-tailed",
    "uniform",
    "positive",
    "negative",
    "sparse",
    "ternary",
    "integers",
    "a few outliers",
    "of every size",
    "mixed within a block",
    "constant",
    "zero",
    "nothing but −0",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_bytes_are_ggmls(ggml_type: GGMLType, kind: str) -> None:
    values = weights(kind)
    np.testing.assert_array_equal(quantize(values, ggml_type), reference(values, ggml_type))


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_subnormal_weights_are_read_back_as_nearly_nothing(ggml_type: GGMLType) -> None:
    """1 / scale overflows there, and what C makes of that is no promise: so no bytes are compared."""
    raw = quantize(weights("subnormal"), ggml_type)
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(ggml_type))
    assert np.abs(values).max() < 1e-37


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_a_block_does_not_depend_on_what_is_quantized_with_it(ggml_type: GGMLType) -> None:
    values = weights("normal", rows=300)  # more than a chunk
    whole = quantize(values, ggml_type)
    np.testing.assert_array_equal(quantize(values[131:133], ggml_type), whole[131:133])
    size = BLOCK_SIZES[ggml_type]
    np.testing.assert_array_equal(quantize(values[7:8, : size.elements], ggml_type), whole[7:8, : size.bytes])
    assert quantize(values[:0], ggml_type).shape == (0, whole.shape[1])


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_threads_do_not_disturb_each_other(ggml_type: GGMLType) -> None:
    values = weights("heavy-tailed", rows=64)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda start: quantize(values[start : start + 8], ggml_type), range(0, 64, 8)))
    np.testing.assert_array_equal(np.concatenate(parts), quantize(values, ggml_type))


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_the_weights_are_left_as_they_are(ggml_type: GGMLType) -> None:
    values = weights("normal", rows=2)
    values.flags.writeable = False
    raw = quantize(values, ggml_type)
    assert not np.shares_memory(raw, values)


def test_columns_of_a_larger_matrix_are_quantized_as_their_copy() -> None:
    values = weights("normal", rows=4)[:, ::2]
    np.testing.assert_array_equal(quantize(values, GGMLType.Q4_K), quantize(values.copy(), GGMLType.Q4_K))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_what_is_no_number_is_refused(ggml_type: GGMLType, bad: float) -> None:
    values = weights("normal", rows=2)
    values[1, 100] = bad
    with pytest.raises(UserError, match=r"m\.gguf: tensor 'x': must be finite"):
        quantize(values, ggml_type, "m.gguf: tensor 'x'")


def test_what_no_f16_scale_holds_is_refused_and_bf16_holds_it() -> None:
    values = np.full((1, 32), 1e6, np.float32)
    with pytest.raises(
        UserError, match=r"at most 65504, the largest f16, for Q8_0; keep the tensor in BF16, got 1000000"
    ):
        quantize(values, GGMLType.Q8_0)
    assert quantize(values, GGMLType.BF16).shape == (1, 64)


def test_a_type_without_a_quantizer_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"must be one of F32, F16, Q4_0.*MXFP4, got 'IQ2_S'"):
        quantize(np.zeros((1, 256), np.float32), GGMLType.IQ2_S)
