"""Quantizing while loading: codes are the nearest for the scales that are kept, and scales are what a scheme promises.

References are in float64. Bounds follow from the formats: e4m3 has four significant bits, f16 has eleven, f32 24.
"""

from collections.abc import Callable

import gguf
import ml_dtypes
import numpy as np
import pytest

from atoma_jax.errors import UserError
from atoma_jax.quant.groups import GroupCodes
from atoma_jax.quant.online import LoadScheme, quantize_rows, scheme_format

SCHEMES: tuple[LoadScheme, ...] = ("int8", "int8_channel", "int4", "fp8", "ternary")
N, K = 16, 512
F32_ROUNDING, F16_ROUNDING = 2.0**-24, 2.0**-11
SMALLEST_HALF = 2.0**-24  # f16 keeps small scales to half of that

WEIGHTS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda rng: rng.normal(0, 0.02, (N, K)),
    "heavy-tailed": lambda rng: rng.standard_t(2.5, (N, K)) * 0.01,
    "positive": lambda rng: rng.uniform(0.5, 1, (N, K)),
    "negative": lambda rng: rng.uniform(-1, -0.5, (N, K)),
    "of every size": lambda rng: rng.normal(0, 1, (N, K)) * 10.0 ** rng.integers(-8, 3, (N, 1)),
    "with rows and groups of zeros": lambda rng: (
        rng.normal(0, 1, (N, K))
        * (rng.random((N, 1)) < 0.7)
        * (rng.random((N, K // 32, 1)) < 0.5).repeat(32, 2).reshape(N, K)
    ),
}
KINDS = tuple(WEIGHTS)


def weights(kind: str, seed: int = 0) -> np.ndarray:
    return WEIGHTS[kind](np.random.default_rng(seed)).astype(np.float32)


def by_group(rows: np.ndarray, result: GroupCodes) -> np.ndarray:
    return rows.astype(np.float64).reshape(N, -1, result.format.group)


def mean_squared_error(values: np.ndarray, weights: np.ndarray) -> float:
    return float(np.mean((values.astype(np.float64) - weights) ** 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_result_has_the_form_that_was_announced(scheme: LoadScheme, kind: str) -> None:
    result = quantize_rows(weights(kind), scheme)
    announced = scheme_format(scheme, K)
    assert result.format == announced
    assert result.codes.shape == (N, K)
    if not announced.float_codes:
        assert result.codes.max() < 2**announced.bits
    for factors in (result.scales, result.mins):
        if factors is not None:
            assert factors.values.shape == (N, K // announced.group)
            assert factors.supers is None
            np.testing.assert_array_equal(factors.values, factors.values.astype(announced.scale_dtype))
    assert (result.mins is not None) == announced.has_mins
    assert np.isfinite(result.values()).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scheme", "scale_rounding"), [("int8", F16_ROUNDING), ("int8_channel", F32_ROUNDING)])
def test_int8_scales_reach_the_largest_value_and_codes_are_the_nearest(
    scheme: LoadScheme, scale_rounding: float, kind: str
) -> None:
    rows = weights(kind)
    result = quantize_rows(rows, scheme)
    exact = by_group(rows, result)
    scales = result.scales.flat().astype(np.float64)
    ideal = np.abs(exact).max(axis=2) / 127
    assert (np.abs(scales - ideal) <= 2 * scale_rounding * ideal + SMALLEST_HALF / 2).all()
    errors = np.abs(by_group(result.values(), result) - exact)
    out_of_reach = np.maximum(np.abs(exact) - 127 * scales[..., None], 0)
    # The quotient is rounded to f32 before it is rounded to a code, and is at most 128; so is the product after.
    assert (errors <= np.maximum(scales[..., None] * (0.5 + 128 * 2 * F32_ROUNDING), out_of_reach)).all()


@pytest.mark.parametrize("scheme", ["int8", "int8_channel"])
def test_int8_is_symmetric(scheme: LoadScheme) -> None:
    rows = weights("heavy-tailed")
    np.testing.assert_array_equal(quantize_rows(-rows, scheme).values(), -quantize_rows(rows, scheme).values())
    assert quantize_rows(rows, scheme).signed().min() == -127


@pytest.mark.parametrize("kind", KINDS)
def test_int4_errs_no_more_than_spreading_the_range_evenly_does(kind: str) -> None:
    rows = weights(kind)
    result = quantize_rows(rows, "int4")
    exact = by_group(rows, result)
    lowest, highest = np.minimum(exact.min(axis=2), 0), exact.max(axis=2)
    step = np.maximum(highest - lowest, 0) / 15
    # What the search starts from errs by half a step at most, and it only ever lowers the sum of squares. Scale and min
    # are then kept in f16, which moves any value by so much:
    mins = result.mins.flat() if result.mins is not None else np.zeros(())
    moved = 15 * (result.scales.flat() * F16_ROUNDING + SMALLEST_HALF / 2) + np.abs(mins) * F16_ROUNDING + SMALLEST_HALF
    norms = np.sqrt(np.sum((by_group(result.values(), result) - exact) ** 2, axis=2))
    assert (norms <= np.sqrt(32) * (step / 2 * (1 + 1e-5) + moved)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_int4_codes_are_the_nearest_for_the_scales_that_are_kept(kind: str) -> None:
    rows = weights(kind)
    result = quantize_rows(rows, "int4")
    exact = by_group(rows, result)[..., None]  # [N, K/g, g, 1]
    assert result.mins is not None
    scales, mins = (factors.flat().astype(np.float64)[..., None, None] for factors in (result.scales, result.mins))
    best = np.abs(scales * np.arange(16) - mins - exact).min(axis=3)
    errors = np.abs(by_group(result.values(), result) - exact[..., 0])
    rounding = 8 * F32_ROUNDING * (15 * scales[..., 0] + np.abs(mins[..., 0]) + np.abs(exact[..., 0]))
    assert (errors <= best + rounding).all()


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed"])
def test_int4_errs_less_than_q4_k(kind: str) -> None:
    rows = weights(kind)
    libgguf = pytest.importorskip("libgguf", reason="libgguf has wheels for Linux on x86-64 only")
    raw = np.frombuffer(libgguf.quantize_rows_raw(int(gguf.GGMLQuantizationType.Q4_K), rows, N, K), np.uint8)
    q4_k = gguf.quants.dequantize(raw.reshape(N, -1), gguf.GGMLQuantizationType.Q4_K)
    assert mean_squared_error(quantize_rows(rows, "int4").values(), rows) < mean_squared_error(q4_k, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_codes_are_the_nearest_e4m3_for_the_scale_of_the_row(kind: str) -> None:
    rows = weights(kind)
    result = quantize_rows(rows, "fp8")
    scales = result.scales.flat().astype(np.float64)
    np.testing.assert_allclose(scales[:, 0], np.abs(rows).max(axis=1) / 448, rtol=2 * F32_ROUNDING)
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    errors = np.abs(result.values() - rows.astype(np.float64))
    best = np.abs(scales[..., None] * numbers - rows.astype(np.float64)[..., None]).min(axis=2)
    assert (errors <= best + 8 * F32_ROUNDING * np.abs(rows)).all()
    # Four significant bits: half a unit in the last is 1/16 of the value, and 2^-10 of the scale below 2^-6 of it.
    assert (errors <= np.maximum(np.abs(rows) / 16, scales * 2.0**-10) * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_ternary_codes_are_bitnets_and_scales_the_best_for_them(kind: str) -> None:
    rows = weights(kind)
    result = quantize_rows(rows, "ternary")
    exact = by_group(rows, result)
    means = np.abs(exact).mean(axis=2, keepdims=True)
    ratios = np.divide(exact, means, out=np.zeros_like(exact), where=means > 0)
    trits = by_group(result.signed(), result)
    clear = np.abs(np.abs(ratios) - 0.5) > 1e-5  # elsewhere the mean's rounding in f32 decides
    np.testing.assert_array_equal(trits[clear], np.clip(np.rint(ratios), -1, 1)[clear])
    count = np.abs(trits).sum(axis=2)
    best = np.divide((exact * trits).sum(axis=2), count, out=np.zeros(count.shape), where=count > 0)
    scales = result.scales.flat()
    assert (np.abs(scales - best) <= best * F16_ROUNDING * (1 + 1e-3) + SMALLEST_HALF / 2).all()


@pytest.mark.parametrize("density", [0.02, 0.3, 0.67, 1.0])
def test_weights_that_are_ternary_already_are_kept_exactly(density: float) -> None:
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.01, 2, (N, 1)).astype(np.float16).astype(np.float32)
    rows = scales * rng.choice([-1, 1], (N, K)).astype(np.float32) * (rng.random((N, K)) < density)
    np.testing.assert_array_equal(quantize_rows(rows, "ternary").values(), rows)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_quantized_each_for_itself(scheme: LoadScheme) -> None:
    rows = np.concatenate([weights("heavy-tailed", seed) for seed in range(20)])  # more than a chunk of the search
    whole, part = quantize_rows(rows, scheme), quantize_rows(rows[130:140], scheme)
    np.testing.assert_array_equal(part.codes, whole.codes[130:140])
    np.testing.assert_array_equal(part.scales.values, whole.scales.values[130:140])
    assert quantize_rows(rows[:0], scheme).codes.shape == (0, K)


@pytest.mark.parametrize(("K", "group"), [(4096, 256), (640, 128), (576, 64), (96, 32)])
def test_ternary_takes_the_largest_group_that_fits(K: int, group: int) -> None:
    assert scheme_format("ternary", K).group == group


@pytest.mark.parametrize("scheme", ["int8", "int4", "ternary"])
def test_rows_that_groups_do_not_fit_are_refused(scheme: LoadScheme) -> None:
    with pytest.raises(UserError, match=r"multiple of 32 inputs and this tensor has 100; w8a8 and fp8"):
        scheme_format(scheme, 100)
    assert quantize_rows(np.ones((2, 100), np.float32), "int8_channel").values().tolist() == [[1.0] * 100] * 2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_is_no_number_is_refused(scheme: LoadScheme, bad: float) -> None:
    rows = weights("normal")
    rows[3, 7] = bad
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up: must be finite"):
        quantize_rows(rows, scheme, "blk.0.ffn_up")


def test_what_no_f16_scale_holds_is_refused() -> None:
    rows = np.full((1, 32), 1e6, np.float32)
    with pytest.raises(UserError, match="at most 65504, the largest f16, for int8"):
        quantize_rows(rows, "int8")
    np.testing.assert_array_equal(quantize_rows(rows, "fp8").values(), rows)
