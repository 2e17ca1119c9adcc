"""The kernel's products are those of float64, for every kind of packed weight, at and off the borders of its tiles."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantized_matmul
from pallas_kernels.planar_dequantize import planar_dequantized
from pallas_kernels.planar_weights import PlanarFormat
from pallas_kernels.tuning import SCALED_WEIGHTS, MatmulTiles, default_tiles
from tests.pallas_kernels.packed_weights import IQ4_NL, Packed, activations, index, packed
from tests.pallas_kernels.products import in_two_bytes, planar_grouped_product, planar_product

FEW = MatmulTiles(block_n=32, block_m=4, splits=2, warps=4, stages=4)
MANY = MatmulTiles(block_n=32, block_m=64, splits=1, warps=8, stages=2)

KINDS = {
    "Q4_0": (PlanarFormat(4, 32, 32, 8, None), False, None),
    "Q4_K": (PlanarFormat(4, 32, 32, 0, None), True, 256),
    "AWQ": (PlanarFormat(4, 64, 128, 0, None), True, None),
    "group of two blocks, mins": (PlanarFormat(4, 16, 128, 0, None), True, None),
    "IQ4_NL": (PlanarFormat(4, 32, 32, 0, IQ4_NL), False, None),
    "Q8_0": (PlanarFormat(8, 32, 32, 128, None), False, None),
    "Q6_K": (PlanarFormat(8, 16, 16, 32, None), False, 256),
    "Q5_K": (PlanarFormat(8, 32, 64, 0, None), True, 256),
    "Q2_K": (PlanarFormat(2, 16, 16, 0, None), True, 256),
    "ternary": (PlanarFormat(2, 32, 512, 1, None), False, None),
}
K = 512
QUICK = ("Q4_K", "IQ4_NL", "Q8_0", "ternary")
RARE = tuple(name for name in KINDS if name not in QUICK)
MOST = [*QUICK, *(name if name == "AWQ" else pytest.param(name, marks=pytest.mark.slow) for name in RARE)]


product = jax.jit(planar_product, static_argnums=(3, 4))


def weight(name: str, N: int) -> Packed:
    kind, mins, supergroup = KINDS[name]
    return packed(kind, S=2, N=N, K=K, mins=mins, supergroup=supergroup)


def is_exact_but_for_sums_in_float32(got: jax.Array, x: np.ndarray, w: Packed) -> bool:
    """Numbers and rounded activations are whole, and so are sums of a span: nothing but the order of spans is left,
    sums of K / span terms, each rounded by half of 2^-23 at most, of what is raised and subtracted again.
    """
    x = in_two_bytes(x, w.kind)
    raised = max(1, np.abs(w.kind.zero - (128 if w.kind.bits == 8 else 0)))
    terms = 4 + x.shape[1] // w.kind.span
    bound = terms * raised * 2.0**-24 * (np.abs(x) @ w.sizes[1].T)
    return bool((np.abs(np.asarray(got, np.float64) - x @ w.values[1].T) <= bound).all())


@pytest.mark.parametrize("name", KINDS)
def test_few_rows_are_exact_but_for_sums_in_float32(name):
    w = weight(name, 40)  # a tile, and a quarter of one
    x = activations(7, K)
    assert is_exact_but_for_sums_in_float32(product(x, w.stack, index(1), w.kind, FEW), x, w)


@pytest.mark.parametrize("rows", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MOST)
def test_so_are_more_and_fewer_spans_side_by_side(name, rows):
    """A turn takes parts of a block, a block, or more than the last part of K has."""
    w = weight(name, 40)
    x = activations(3, K)
    tiles = replace(FEW, block_m=rows, splits=1 if rows == 1 else 2)
    assert is_exact_but_for_sums_in_float32(product(x, w.stack, index(1), w.kind, tiles), x, w)


@pytest.mark.parametrize(("name", "splits"), [("Q4_K", 1), ("Q4_K", 2), ("Q8_0", 1), ("Q8_0", 2)])
def test_a_last_turn_may_have_fewer_blocks(name, splits):
    kind, mins, supergroup = KINDS[name]
    w = packed(kind, S=2, N=40, K=1280, mins=mins, supergroup=supergroup)
    x = activations(2, 1280)
    tiles = replace(FEW, block_m=1, splits=splits, turn=512)
    assert 1280 % 512
    assert is_exact_but_for_sums_in_float32(product(x, w.stack, index(1), w.kind, tiles), x, w)


@pytest.mark.parametrize("name", MOST)
def test_a_whole_weight_is_dequantized_as_plain_xla_does_it(name):
    """Bit for bit: numbers times scales less mins in float32, rounded to bfloat16."""
    w = weight(name, 40)
    scales, mins = (
        None if values is None else quantized_matmul.flat_factors(values[1], None if supers is None else supers[1]).T
        for values, supers in ((w.stack.scales, w.stack.scale_supers), (w.stack.mins, w.stack.min_supers))
    )
    codes = quantized_matmul.unpack_planar(w.stack.words[1], w.kind.bits, w.kind.plane).reshape(40, -1, w.kind.group)
    want = quantized_matmul.dequantize(codes, scales, mins, zero=w.kind.zero, table=w.kind.table)
    got = jax.jit(partial(planar_dequantized, kind=w.kind, K=K, interpret=True))(w.stack, index(1))
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", MOST)
def test_of_many_rows_weights_are_rounded_to_bfloat16(name):
    w = weight(name, 64)
    x = activations(130, K)
    got = np.asarray(product(x, w.stack, index(0), w.kind, MANY), np.float64)
    want = x @ w.values[0].T
    # Scale, product, min and difference are rounded to 8 bits each, by half of 2^-8 at most.
    assert (np.abs(got - want) <= 2 * 2.0**-8 * (np.abs(x) @ w.sizes[0].T)).all()
    assert np.linalg.norm(got - want) < 4e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("M", [1, 33, 4096])
def test_any_number_of_rows_in_the_tiles_that_are_the_default_for_it(M):
    w = weight("Q4_0", 40)
    x = activations(M, K)
    tiles = default_tiles("planar_matmul", M=M, N=40, K=K, bits=4, group=32)
    got = np.asarray(product(x, w.stack, index(1), w.kind, tiles), np.float64)
    if tiles.block_m < SCALED_WEIGHTS:
        assert is_exact_but_for_sums_in_float32(got, x, w)
    else:
        assert (np.abs(got - x @ w.values[1].T) <= 2.0**-8 * (np.abs(x) @ w.sizes[1].T)).all()


def test_it_is_the_product_of_plain_xla():
    w = weight("Q4_K", 40)
    x = in_two_bytes(activations(7, K), w.kind)
    scales, mins = (
        quantized_matmul.flat_factors(values[1], supers[1])
        for values, supers in ((w.stack.scales, w.stack.scale_supers), (w.stack.mins, w.stack.min_supers))
    )
    static = {"bits": 4, "plane": w.kind.plane, "zero": 0, "table": None, "operands": jnp.dtype("float32")}
    want = jax.jit(partial(quantized_matmul.matmul_planar, **static))(x, w.stack.words[1], scales, mins)
    np.testing.assert_allclose(product(x, w.stack, index(1), w.kind, FEW), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_a_row_that_holds_nan_stays_alone(rows):
    w = weight("Q4_K", 40)
    x = activations(17, K)
    x[16] = np.nan  # the first of its tile, beside rows that are not there
    got = np.asarray(product(x, w.stack, index(1), w.kind, replace(FEW, block_m=rows)))
    assert np.isnan(got[16]).all()
    assert np.isfinite(got[:16]).all()


@pytest.mark.parametrize(
    ("plane", "group", "aligned"), [(32, 32, True), (32, 256, True), (16, 48, False), (64, 96, False), (64, 32, False)]
)
def test_groups_are_whole_blocks_or_blocks_whole_groups(plane, group, aligned):
    assert PlanarFormat(4, plane, group, 8, None).is_aligned == aligned


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in RARE)])
def test_groups_of_rows_have_weights_of_their_own(name):
    """Blocks of one row to more than a tile's, each with its expert's weight; work behind the last is not done."""
    w = weight(name, 40)
    x = activations(24, K)
    start, stop, expert = np.int32([0, 2, 19, 0]), np.int32([2, 19, 20, 16]), np.int32([1, 0, 1, 0])
    run = jax.jit(partial(planar_grouped_product, kind=w.kind, tiles=FEW, most=32))
    got = np.asarray(run(x, w.stack, index(3), expert, start, stop), np.float64)
    for first, last, one in zip(start[:3], stop[:3], expert[:3], strict=True):
        rows = x[first:last]
        allowed = K * 2.0**-24 * (np.abs(rows) @ w.sizes[one].T)
        assert (np.abs(got[first:last] - rows @ w.values[one].T) <= allowed).all()
