"""Products with weights in tiles: every variant of the kernels against float64, over every form of weight."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atoma_jax.native import matmul as native
from atoma_jax.native import rowwise
from atoma_jax.native.library import Library
from atoma_jax.quant.groups import F32, GroupFormat
from pallas_kernels.quantized_matmul import quantize_tokens
from tests.native.weights import FORMATS, Tiled, activations, tiled

# Of the largest number of a row: int8 rounds to 1/254 of a group's largest, and two planes to 1/254 of that.
TOLERANCE = {"groups": 1.5e-2, "planes": 6e-5, "exact": 2e-6}
ROW_COUNTS = (1, 2, 3, 4, 5, 16, 17, 64)
ALL_KINDS: tuple[native.Activations, ...] = ("groups", "planes", "tokens", "exact")

product = jax.jit(native.matmul, static_argnums=3)  # variants share the programs: they are chosen when these run
rows = jax.jit(native.rows)


def error_of(y: jax.Array, x: jax.Array, values: np.ndarray) -> float:
    wanted = np.asarray(x, np.float64) @ values.astype(np.float64).T
    return float((np.abs(np.asarray(y) - wanted) / np.abs(wanted).max(axis=1, keepdims=True)).max())


@pytest.mark.parametrize("how", TOLERANCE)
@pytest.mark.parametrize("kind", FORMATS)
def test_products_are_those_of_float64(variant: str, kind: str, how: native.Activations) -> None:
    K = 512
    made = tiled(FORMATS[kind], 70, K)  # two tiles, and six columns of a third
    x = activations(5, K)
    for matrix in range(2):
        y = product(x, made.weight, matrix, how)
        assert error_of(y, x, made.values[matrix]) < TOLERANCE[how]


@pytest.mark.parametrize("kind", ["Q3_K", "Q5_1", "Q6_K", "Q8_0"])
def test_more_blocks_than_are_joined_at_once(variant: str, kind: str) -> None:
    made = tiled(FORMATS[kind], 70, 1280)
    x = activations(9, 1280)
    y = product(x, made.weight, 1, "groups")
    assert error_of(y, x, made.values[1]) < TOLERANCE["groups"]
    np.testing.assert_array_equal(np.asarray(product(x[8:], made.weight, 1, "groups")), np.asarray(y)[8:])


@pytest.mark.parametrize(
    ("group", "K"), [(16, 16), (16, 48), (32, 32), (40, 40), (70, 70), (24, 24)], ids=lambda value: str(value)
)
def test_few_inputs_and_blocks_that_they_do_not_fill(variant: str, group: int, K: int) -> None:
    made = tiled(GroupFormat(bits=4, group=group, zero=8, scale_dtype=F32, min_dtype=F32), 33, K)
    x = activations(3, K)
    assert error_of(product(x, made.weight, 1, "planes"), x, made.values[1]) < TOLERANCE["planes"]


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *((kind, "groups") for kind in FORMATS),  # few rows read factors as they are stored, many decode them first
        *(("Q4_1", "planes"), ("Q6_K", "tokens"), ("TQ2_0", "exact")),
    ],
)
def test_a_row_is_the_same_however_many_others_there_are(variant: str, kind: str, how: native.Activations) -> None:
    made = tiled(FORMATS[kind], 70, 256)
    x = np.asarray(activations(300, 256))  # more than a piece of work takes
    y = np.asarray(product(x, made.weight, 0, how))
    for count in ROW_COUNTS:
        alone = np.asarray(product(x[300 - count :], made.weight, 0, how))
        np.testing.assert_array_equal(alone, y[300 - count :])


@pytest.mark.parametrize("how", ALL_KINDS)
@pytest.mark.parametrize("count", [1, 5, 40])  # factors as they are stored, and decoded; results made aside
def test_norms_in_front_and_gates_behind_have_the_bits_of_their_own_calls(
    variant: str, count: int, how: native.Activations
) -> None:
    K, F = 96, 64
    made = tiled(FORMATS["Q4_1"], 2 * F, K)
    x = np.zeros((count + 2, K), np.float32)
    x[:count] = np.asarray(activations(count, K))
    scale = jnp.linspace(0.5, 1.5, K, dtype=jnp.float32)
    normed = jax.jit(partial(rowwise.rms_norm, eps=1e-5))(x, scale)
    apart = product(normed, made.weight, 1, how)
    joined = partial(native.matmul, activations=how, norm=(scale, 1e-5))
    np.testing.assert_array_equal(jax.jit(joined)(x, made.weight, jnp.int32(1)), apart)
    assert native.takes_gate(made.weight)
    for activation in rowwise.GATES:
        y = jax.jit(partial(joined, gate=activation))(x, made.weight, jnp.int32(1))
        np.testing.assert_array_equal(y, jax.jit(partial(rowwise.gated, activation=activation))(apart))
        assert not np.asarray(y)[count:].any()


@pytest.mark.parametrize("how", ["groups", "planes"])
@pytest.mark.parametrize("count", [1, 5, 40, 300])
@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K", "Q6_K", "Q8_0", "MXFP4", "Q2_K"])
def test_a_net_has_the_bits_of_two_products(variant: str, kind: str, count: int, how: native.Activations) -> None:
    D, F = 70, 64 if FORMATS[kind].supergroup is None else 256  # the last tile of rows that come out is not full
    up, down = tiled(FORMATS["Q4_1"], 2 * F, D - D % 32).weight, tiled(FORMATS[kind], D, F).weight
    K = up.shape[1]
    x = np.zeros((count + 2, K), np.float32)
    x[:count] = np.asarray(activations(count, K))
    residual = np.asarray(activations(count + 2, D, seed=1))
    norm = (jnp.linspace(0.5, 1.5, K, dtype=jnp.float32), 1e-5)
    one, zero = jnp.int32(1), jnp.int32(0)
    assert native.takes_net(up, how)

    @jax.jit
    def apart(x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = native.matmul(x, up, one, how, norm=norm, gate="silu")
        return native.matmul(h, down, zero, how), native.matmul(h, down, zero, how, residual=residual)

    @jax.jit
    def joined(x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        net = partial(native.gated_net, x, up, one, down, zero, how, "silu", norm=norm)
        return net(), net(residual=residual)

    for due, y in zip(apart(x, residual), joined(x, residual), strict=True):
        np.testing.assert_array_equal(y, due)


@pytest.mark.parametrize("count", [1, 40])
def test_a_net_is_written_over_its_own_input_where_nothing_else_reads_it(variant: str, count: int) -> None:
    D, F = 96, 64
    up, down = tiled(FORMATS["Q4_1"], 2 * F, D).weight, tiled(FORMATS["Q4_0"], D, F).weight
    zero = jnp.int32(0)
    x = activations(count, D)

    def net(x: jax.Array) -> jax.Array:
        return native.gated_net(x, up, zero, down, zero, "groups", "silu", residual=x)

    compiled = jax.jit(net, donate_argnums=0).lower(x).compile()
    assert " copy(" not in compiled.as_text()
    due = jax.jit(lambda x: x + native.gated_net(x, up, zero, down, zero, "groups", "silu"))(x)
    kept = jax.jit(lambda x: (x, net(x)))(x)  # who else reads it sees it as it was
    np.testing.assert_array_equal(kept[0], x)
    np.testing.assert_array_equal(kept[1], due)
    np.testing.assert_array_equal(compiled(x + 0), due)


@pytest.mark.parametrize("how", ["tokens", "exact"])
def test_a_net_whose_gates_are_not_rounded_tile_by_tile_is_refused(kernels: Library, how: native.Activations) -> None:
    up, down = tiled(FORMATS["Q4_1"], 128, 96).weight, tiled(FORMATS["Q4_1"], 96, 64).weight
    assert not native.takes_net(up, how)
    zero = jnp.int32(0)
    with pytest.raises(Exception, match="rounds groups"):
        jax.block_until_ready(native.gated_net(activations(1, 96), up, zero, down, zero, how, "silu"))


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_what_a_product_is_added_to(variant: str, count: int, kind: str) -> None:
    made = tiled(FORMATS[kind], 70, 256)
    x = np.zeros((count + 2, 256), np.float32)
    x[:count] = np.asarray(activations(count, 256))
    residual = np.asarray(activations(count + 2, 70))
    y = jax.jit(partial(native.matmul, activations="groups"))(x, made.weight, jnp.int32(0), residual=residual)
    np.testing.assert_array_equal(y, residual + np.asarray(product(x, made.weight, 0, "groups")))


def test_the_number_of_threads_does_not_show(kernels: Library) -> None:
    made = tiled(FORMATS["Q4_K"], 500, 256)
    x = activations(300, 256)
    results = []
    for threads in (1, 2, 3, 8):
        with kernels.forced(threads=threads):
            results.append(np.asarray(product(x, made.weight, 0, "groups")))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("how", ALL_KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_shows_it_and_no_other_does(
    variant: str, how: native.Activations, value: float
) -> None:
    made = tiled(FORMATS["Q4_1"], 70, 256)
    x = activations(6, 256)
    spoilt = x.at[2, 100].set(value)
    clean, y = (np.asarray(product(rows, made.weight, 0, how)) for rows in (x, spoilt))
    assert not np.isfinite(y[2]).any()
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(y[others], clean[others])


@pytest.mark.parametrize("how", ["groups", "planes", "tokens"])
def test_zeros_and_denormal_numbers_give_zeros(variant: str, how: native.Activations) -> None:
    made = tiled(FORMATS["Q8_0"], 70, 256)
    x = jnp.zeros((3, 256), jnp.float32).at[1].set(1e-40).at[2].set(-1e-38)
    y = np.asarray(product(x, made.weight, 0, how))
    assert np.abs(y).max() < 1e-30


@pytest.mark.parametrize("how", ALL_KINDS)
def test_rows_that_fill_a_program_up_change_no_other_and_give_zeros(variant: str, how: native.Activations) -> None:
    made = tiled(FORMATS["Q4_1"], 70, 96)
    x = np.asarray(activations(5, 96))
    filled = np.concatenate([x[:2], np.zeros_like(x[:1]), x[2:], np.zeros_like(x), -np.zeros_like(x)])
    clean, y = (np.asarray(product(rows, made.weight, 0, how)) for rows in (x, filled))
    np.testing.assert_array_equal(y[[0, 1, 3, 4, 5]], clean)
    assert not y[2].any()
    assert not y[6:].any()
    assert not np.asarray(product(filled[6:], made.weight, 0, how)).any()


def test_a_last_row_that_holds_nothing_but_nan_is_computed(variant: str) -> None:
    made = tiled(FORMATS["Q4_1"], 70, 64)
    x = np.zeros((3, 64), np.float32)
    x[1, 63], x[2, 40] = 1.0, np.nan
    y = np.asarray(product(x, made.weight, 0, "groups"))
    assert not y[0].any()
    assert y[1].any()
    assert np.isnan(y[2]).all()


def test_denormal_scales_count(variant: str) -> None:
    made = tiled(FORMATS["Q8_0"], 32, 256)
    weight = jax.tree.map(lambda leaf: leaf, made.weight)
    scales = (made.weight.scales.astype(jnp.float32) * 2**-20).astype(jnp.float16)  # below 2^-14
    assert 0 < float(jnp.abs(scales).max()) < 6e-5
    object.__setattr__(weight, "scales", scales)
    y = np.asarray(rows(jnp.arange(32, dtype=jnp.int32), weight, jnp.int32(0)))
    numbers = made.values[0] / np.repeat(np.asarray(made.weight.scales[0, 0].T, np.float32), 32, axis=1)
    wanted = numbers.round() * np.repeat(np.asarray(scales[0, 0].T, np.float32), 32, axis=1)
    np.testing.assert_array_equal(y, wanted)
    x = activations(2, 256)
    assert error_of(product(x, weight, 0, "planes"), x, wanted) < TOLERANCE["planes"]


@pytest.mark.parametrize("kind", ["TQ2_0", "Q4_0", "Q8_0"])
def test_tokens_are_rounded_as_bitnet_was_trained(variant: str, kind: str) -> None:
    made = tiled(FORMATS[kind], 70, 256)
    x = activations(3, 256)
    codes, factor = (np.asarray(part, np.float64) for part in quantize_tokens(x))
    wanted = codes @ made.values[0].astype(np.float64).T * factor
    y = np.asarray(product(x, made.weight, 0, "tokens"))
    assert np.abs(y - wanted).max() < 2e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_are_exact(kernels: Library, kind: str) -> None:
    made = tiled(FORMATS[kind], 70, 512)
    ids = jnp.asarray([69, 0, 33, 33], jnp.int32)
    np.testing.assert_array_equal(np.asarray(rows(ids, made.weight, jnp.int32(1))), made.values[1][np.asarray(ids)])


def test_a_row_that_is_not_there_is_nan(kernels: Library) -> None:
    made = tiled(FORMATS["Q4_0"], 70, 64)
    y = np.asarray(rows(jnp.asarray([-1, 70, 3], jnp.int32), made.weight, jnp.int32(0)))
    assert np.isnan(y[:2]).all()
    assert np.isfinite(y[2]).all()


def wrong(made: Tiled, **changes: jax.Array) -> jax.Array:
    weight = jax.tree.map(lambda leaf: leaf, made.weight)
    for name, value in changes.items():
        object.__setattr__(weight, name, value)
    return native.matmul(activations(1, 64), weight, jnp.int32(0), "groups")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weight: {"codes": weight.codes[..., :-32]}, "codes must be"),
        (lambda weight: {"codes": weight.codes[:, :, :1]}, "do not hold the inputs"),
        (lambda weight: {"scales": weight.scales[:1]}, "differ in lead"),
        (lambda weight: {"scales": weight.scales[..., :16]}, "factors must be"),
        (lambda weight: {"scales": weight.scales.astype(jnp.int32)}, "f32, f16, bf16 or int8"),
    ],
    ids=["bytes", "blocks", "lead", "lanes", "dtype"],
)
def test_arrays_that_do_not_belong_together_are_refused(kernels: Library, change: partial, problem: str) -> None:
    made = tiled(FORMATS["Q4_0"], 70, 64)
    with pytest.raises(Exception, match=problem):
        jax.block_until_ready(wrong(made, **change(made.weight)))


@pytest.mark.parametrize("index", [-1, 2])
def test_a_matrix_outside_the_stack_is_refused(kernels: Library, index: int) -> None:
    made = tiled(FORMATS["Q4_0"], 70, 64)
    with pytest.raises(Exception, match="outside the stack"):
        jax.block_until_ready(product(activations(1, 64), made.weight, index, "groups"))


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"gate": "silu"}, "must be whole tiles"),
        ({"gate": "silu", "residual": jnp.ones((1, 70))}, "behind one product"),
        ({"residual": jnp.ones((1, 64))}, "different abstract value"),  # JAX's words: it is written in place
    ],
    ids=["tiles", "both", "residual"],
)
def test_what_does_not_fit_in_front_or_behind_is_refused(kernels: Library, extra: dict, problem: str) -> None:
    made = tiled(FORMATS["Q4_0"], 70, 64)
    with pytest.raises(Exception, match=problem):
        jax.block_until_ready(native.matmul(activations(1, 64), made.weight, jnp.int32(0), "groups", **extra))
