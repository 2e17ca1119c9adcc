"""Searches for the scales (and mins) of groups, as ggml does without an importance matrix: try a few scales around the
obvious one, solve each try by least squares, keep the best.

Groups lie in columns, `[n, groups]`: one numpy operation works on one element of every group, and a sum over axis 0
adds in the order of ggml's loops, so that results are equal to the last bit. Method and constants: ggml-quants.c
(make_qkx2_quants, make_qx_quants, make_q3_quants, quantize_row_iq4_nl_impl).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

_Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
_Numbers: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_TINY = np.float32(1e-15)  # a group whose values are all below it counts as zero
_F = np.float32


class AffineFit(NamedTuple):
    """x ≈ scales · codes − mins."""

    codes: _Floats  # [n, groups], integers in [0, top]
    scales: _Floats  # [groups]
    mins: _Floats  # [groups], never negative


class SymmetricFit(NamedTuple):
    """x ≈ scales · (codes − half)."""

    codes: _Floats  # [n, groups], integers in [0, 2·half); all 0 in a group of zeros, whose scale is 0
    scales: _Floats  # [groups], of either sign


def sum_in_order(terms: _Floats) -> _Floats:
    """[n, groups] to [groups], one after the other: numpy adds a single column pairwise."""
    if terms.shape[1] == 1:
        return np.add.accumulate(terms, axis=0)[-1]
    return np.add.reduce(terms, axis=0)


def peaks(x: _Floats) -> _Floats:
    """The value of each column that is largest by magnitude, the first of equals, with its sign."""
    first = np.abs(x).argmax(axis=0)
    return np.take_along_axis(x, first[None], axis=0)[0]


@np.errstate(
    divide="ignore", invalid="ignore", over="ignore"
)  # tries that cannot win: a group of one value, or of none
def affine_fit(
    x: _Floats, weights: _Floats, *, top: int, first: float, step: float, tries: int, absolute: bool = False
) -> AffineFit:
    """Codes of 0 to `top` with a scale and a min, by weighted error.

    Args:
        x: [n, groups].
        weights: as x, not negative.
        top: the largest code.
        first: the first try spreads the range of a group over `top + first` steps …
        step: … and each further one over so many more.
        tries: how many.
        absolute: the error is the weighted sum of |differences|, not of squares; scale and min are least squares still.
    """
    lowest = np.minimum(x.min(axis=0), 0)  # a min is subtracted, and stored without a sign
    highest = x.max(axis=0)
    flat = highest == lowest
    sum_w, sum_x = sum_in_order(weights), sum_in_order(weights * x)
    codes, scratch = np.empty_like(x), np.empty_like(x)

    def quantize(inverse: _Floats, low: _Floats) -> None:
        np.subtract(x, low, out=codes)
        np.multiply(codes, inverse, out=codes)
        np.rint(codes, out=codes)
        np.clip(codes, 0, top, out=codes)

    def error(scale: _Floats, low: _Floats) -> _Floats:
        np.multiply(codes, scale, out=scratch)
        np.add(scratch, low, out=scratch)
        np.subtract(scratch, x, out=scratch)
        np.abs(scratch, out=scratch) if absolute else np.multiply(scratch, scratch, out=scratch)
        np.multiply(scratch, weights, out=scratch)
        return sum_in_order(scratch)

    inverse = _F(top) / (highest - lowest)
    scale, low = _F(1) / inverse, lowest
    quantize(inverse, low)
    best = error(scale, low)
    best_inverse, best_low = inverse, low  # what the codes of the best try came from
    for trial in range(tries):
        inverse = (_F(first) + _F(step) * _F(trial) + _F(top)) / (highest - low)
        quantize(inverse, low)
        np.multiply(weights, codes, out=scratch)
        sum_l = sum_in_order(scratch)
        sum_xl = sum_in_order(scratch * x)
        np.multiply(scratch, codes, out=scratch)
        sum_l2 = sum_in_order(scratch)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = new_low > 0
        new_scale = np.where(above, sum_xl / sum_l2, new_scale)
        new_low = np.where(above, _F(0), new_low)
        new_error = error(new_scale, new_low)
        better = (determinant > 0) & (new_error < best)
        best = np.where(better, new_error, best)
        best_inverse, best_low = np.where(better, inverse, best_inverse), np.where(better, low, best_low)
        scale, low = np.where(better, new_scale, scale), np.where(better, new_low, low)
    quantize(best_inverse, best_low)
    np.fmax(codes, 0, out=codes)  # NaN where a range is so small that its inverse is infinite
    codes[:, flat] = 0
    return AffineFit(codes, np.where(flat, _F(0), scale), -np.where(flat, lowest, low))


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def symmetric_fit(x: _Floats, half: int) -> SymmetricFit:
    """Codes of 0 to 2·`half` − 1 around `half`, by the error weighted with x²: 18 tries around the scale that gives the
    largest value the code 0."""
    peak = peaks(x)
    zeros = np.abs(peak) < _TINY
    weights = x * x
    weighted = weights * x

    def sums(inverse: _Floats) -> tuple[_Floats, _Floats]:
        codes = np.clip(np.rint(inverse * x), -half, half - 1)
        return sum_in_order(weighted * codes), sum_in_order(weights * codes * codes)

    chosen = _F(-half) / peak
    sum_lx, sum_l2 = sums(chosen)
    scale = np.where(sum_l2 != 0, sum_lx / sum_l2, _F(0))
    best = scale * sum_lx
    for trial in (*range(-9, 0), *range(1, 10)):
        inverse = -(_F(half) + _F(0.1) * _F(trial)) / peak
        sum_lx, sum_l2 = sums(inverse)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = np.where(better, sum_lx / sum_l2, scale)
        best = np.where(better, scale * sum_lx, best)
        chosen = np.where(better, inverse, chosen)
    codes = np.clip(np.rint(chosen * x), -half, half - 1) + half
    codes[:, zeros] = 0
    return SymmetricFit(codes, np.where(zeros, _F(0), scale))


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def refined_fit(x: _Floats, half: int) -> SymmetricFit:
    """As `symmetric_fit`, but from one scale on, changing code after code while the fit improves, for five rounds."""
    peak = peaks(x)
    zeros = np.abs(peak) < _TINY
    weights = x * x
    weighted = weights * x
    codes = np.clip(np.rint(_F(-half) / peak * x), -half, half - 1)
    codes[:, zeros] = 0
    sum_lx, sum_l2 = sum_in_order(weighted * codes), sum_in_order(weights * codes * codes)
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            w, wx, code = weights[i], weighted[i], codes[i]
            lx = sum_lx - wx * code
            l2 = sum_l2 - w * code * code
            new = np.clip(np.rint(x[i] * l2 / lx), -half, half - 1)
            new_lx = lx + wx * new
            new_l2 = l2 + w * new * new
            better = (lx > 0) & (new != code) & (new_l2 > 0)
            better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            codes[i] = np.where(better, new, code)
            sum_lx, sum_l2 = np.where(better, new_lx, sum_lx), np.where(better, new_l2, sum_l2)
            changed = changed or bool(better.any())
        if not changed:
            break
    codes += half
    codes[:, zeros] = 0
    return SymmetricFit(codes, np.where(zeros | (sum_l2 <= 0), _F(0), sum_lx / sum_l2))


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def codebook_fit(x: _Floats, table: Sequence[int], tries: int) -> SymmetricFit:
    """Codes that stand for the ascending numbers of `table`, by the error weighted with x²: `tries` scales on either
    side of the one that gives the largest value `table[0]`. Codes are nearest to x at the final scale."""
    numbers = np.asarray(table, np.float32)
    # Twice a middle between two numbers is an integer, so twice a value rounded down says on which side of it it lies.
    lowest = 2 * table[0]
    code_of = np.searchsorted(numbers[1:] + numbers[:-1], np.arange(lowest, 2 * table[-1] + 1), side="right")
    number_of = numbers[code_of]
    peak = peaks(x)
    zeros = np.abs(peak) < _TINY
    weights = x * x

    def nearest(inverse: _Floats, answers: _Numbers) -> _Numbers:
        doubled = np.floor(inverse * x * 2)
        doubled -= lowest
        return np.take(answers, doubled.astype(np.int32), mode="clip")

    def sums(inverse: _Floats) -> tuple[_Floats, _Floats]:
        chosen = nearest(inverse, number_of)
        weighted = weights * chosen
        return sum_in_order(weighted * x), sum_in_order(weighted * chosen)

    sum_qx, sum_q2 = sums(_F(1) / (-peak / numbers[0]))
    scale = np.where(sum_q2 > 0, sum_qx / sum_q2, _F(0))
    best = scale * sum_qx
    for trial in range(-tries, tries + 1):
        sum_qx, sum_q2 = sums((_F(trial) + numbers[0]) / peak)
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        scale = np.where(better, sum_qx / sum_q2, scale)
        best = np.where(better, scale * sum_qx, best)
    scale = np.where(zeros, _F(0), scale)
    inverse = np.where(scale != 0, _F(1) / scale, _F(0))
    return SymmetricFit(nearest(inverse, code_of).astype(np.float32), scale)
