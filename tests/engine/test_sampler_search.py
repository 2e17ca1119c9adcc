"""The parts under the sampler: the generator, reductions over the vocabulary, the cut of top-k and top-p."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32 as library_threefry

from atoma_jax.engine.draw import draw
from atoma_jax.engine.sampling_rows import Column, decode_rows, encode
from atoma_jax.engine.threefry import threefry_2x32
from atoma_jax.engine.thresholds import find_cut, order_of
from atoma_jax.engine.vocab_blocks import argmax, block_max, exact_sum, largest, low_bits
from atoma_jax.ops import has_native_kernels
from atoma_jax.sampling_params import SamplingParams


def test_generator_is_the_one_behind_jax_random():
    words = np.random.default_rng(0).integers(0, 2**32, (4, 50), dtype=np.uint32)
    a, b, c, d = jnp.asarray(words)
    mine = threefry_2x32((a, b), (c, d))
    for i in range(50):
        theirs = library_threefry(jnp.asarray(words[:2, i]), jnp.asarray(words[2:, i]))
        assert [int(mine[0][i]), int(mine[1][i])] == theirs.tolist()


@pytest.mark.parametrize("V", [1, 97, 128, 1024])
def test_largest_and_argmax_are_those_of_a_stable_sort(V):
    rng = np.random.default_rng(V)
    x = rng.integers(-20, 20, (5, V)).astype(np.float32)  # full of ties
    x[3] = -np.inf
    x[4, V // 2 :] = -np.inf
    n = min(V, 20)
    on_device = jnp.asarray(x)
    tops = block_max(on_device)
    values, ids = jax.jit(largest, static_argnums=2)(on_device, tops, n)
    expected = np.argsort(-x, axis=1, kind="stable")[:, :n]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, 1))
    np.testing.assert_array_equal(argmax(on_device, tops), expected[:, 0])


@pytest.mark.parametrize("terms", [97, 49152, 262144])
def test_sums_are_exact_at_their_limit(terms):
    low = low_bits(terms)
    rng = np.random.default_rng(0)
    x = rng.multinomial(2 ** (23 + low) - 1, rng.dirichlet(np.ones(terms))).astype(np.int32)
    assert int(exact_sum(jnp.asarray(x), low)) == x.sum(dtype=np.int64)
    worst = np.full(terms, (1 << low) - 1, np.int32)  # the lower parts alone
    assert int(exact_sum(jnp.asarray(worst), low)) == worst.sum(dtype=np.int64)


def sorted_cut(logits, weights, top_k, top_p):
    """What a sorted row keeps: ids of the top-k tokens with their ties, of those the top-p ones with theirs."""
    kept = np.ones(len(logits), bool)
    if 0 < top_k < len(logits):
        kept = logits >= np.sort(logits)[-top_k]
    if top_p < 1:
        order = np.argsort(-np.where(kept, logits, -np.inf), kind="stable")
        running = np.cumsum(np.where(kept, weights, 0)[order], dtype=np.int64)
        need = max(1, int(np.ceil(np.float32(running[-1]) * np.float32(top_p))))
        kept &= logits >= logits[order[np.searchsorted(running, need)]]
    return kept


def rows_of_every_shape(V, rng):
    normal = rng.standard_normal(V) * 3
    ties = rng.integers(-3, 3, V).astype(float)
    peak = np.full(V, -8.0)
    peak[V // 3] = 10.0
    barred = np.where(rng.random(V) < 0.7, -np.inf, normal)
    zipf = -1.5 * np.log(rng.permutation(V) + 1.0)
    return np.stack([normal, ties, np.zeros(V), peak, barred, zipf, normal / 1e6, normal * 100]).astype(np.float32)


@pytest.mark.parametrize("V", [97, 4096])
def test_cut_keeps_what_a_sorted_row_keeps(V):
    """4,096 tokens go through the candidates, and through all tokens where those do not suffice."""
    rng = np.random.default_rng(V)
    logits = rows_of_every_shape(V, rng)
    shifted = (logits - logits.max(1, keepdims=True)).astype(np.float64)
    probs = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    weights = np.round(probs * 2.0 ** (23 + low_bits(V))).astype(np.int32)
    cut = jax.jit(find_cut)
    lowest = jnp.full(len(logits), order_of(jnp.float32(-jnp.inf)))
    top = order_of(jnp.max(jnp.asarray(logits), axis=1))
    for top_k in (0, 1, 2, 50, 511, 512, 513, V - 1, V, 2**31 - 1):
        for top_p in (1.0, 0.999, 0.9, 0.5, 1e-6):
            k, p = jnp.full(len(logits), top_k), jnp.full(len(logits), top_p, jnp.float32)
            found = np.asarray(order_of(jnp.asarray(logits)) >= cut(logits, weights, lowest, top, k, p)[:, None])
            for row in range(len(logits)):
                expected = sorted_cut(logits[row], weights[row], top_k, top_p)
                np.testing.assert_array_equal(found[row], expected, err_msg=f"{row=} {top_k=} {top_p=}")


# Without a compiler there is nothing to compare XLA's draws with.
@pytest.mark.skipif(not has_native_kernels(), reason="the native kernels are not built, or do not fit")
def test_native_kernels_draw_what_xla_draws():
    V, B = 4096, 512  # one request at many positions
    draws = [jax.jit(partial(draw, native=native)) for native in (False, True)]
    for given in ({}, {"temperature": 0.5, "top_k": 300}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.6, "min_p": 0.01}):
        words = np.tile(encode(SamplingParams(**given), slot=0, seed=3), (B, 1))
        words[:, Column.POSITION] = np.arange(B)
        settings = decode_rows(jnp.asarray(words))
        for logits in rows_of_every_shape(V, np.random.default_rng(4)):
            rows, top = jnp.broadcast_to(logits, (B, V)), jnp.full(B, logits.max())
            xla, native = (np.asarray(f(rows, top, settings, jnp.ones(B, bool))) for f in draws)
            # Exponentials differ in their last bits: a number that falls between two tokens may take the other one.
            assert np.mean(xla == native) >= 1 - 4 / B, given
            assert set(logits[native]) <= set(logits[logits >= logits[xla].min()]), given
