"""Each row is multiplied by its own expert's weight, whatever the routing; only chosen experts are read."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul as kernel

E, K, N = 5, 16, 24
rng = np.random.default_rng(0)
WEIGHTS = rng.standard_normal((E, N, K)).astype(np.float32)


@jax.jit
def mixture(x, experts, shares):
    blocks = kernel.expert_blocks(experts, E)

    def product(rows, expert):
        return rows @ jax.lax.dynamic_index_in_dim(jnp.asarray(WEIGHTS), expert, keepdims=False).T

    y = kernel.grouped_product(kernel.sorted_rows(x, blocks, E), blocks, product, N)
    return kernel.combine(y, blocks, shares), blocks.used


def expected(x, experts, shares):
    out = np.zeros((len(x), N))
    for token, choice in np.ndindex(*experts.shape):
        out[token] += shares[token, choice] * (WEIGHTS[experts[token, choice]].astype(np.float64) @ x[token])
    return out


@hypothesis.settings(max_examples=60)
@hypothesis.given(data=st.data())
def test_any_routing(data):
    T, k = data.draw(st.sampled_from([(1, 2), (3, 1), (40, 2), (150, 3)]))  # each shape compiles anew
    seed = data.draw(st.integers(0, 2**32 - 1))
    draw = np.random.default_rng(seed)
    favoured = data.draw(st.integers(1, E))  # few experts take all tokens, or all take some
    experts = np.stack([draw.permutation(E)[:k] if favoured >= k else draw.integers(0, favoured, k) for _ in range(T)])
    if favoured < E and favoured >= k:
        experts = np.stack([draw.permutation(favoured)[:k] for _ in range(T)])
    x = draw.standard_normal((T, K)).astype(np.float32)
    shares = draw.uniform(0, 1, (T, k)).astype(np.float32)
    got, used = mixture(x, experts.astype(np.int32), shares)
    np.testing.assert_allclose(got, expected(x, experts, shares), rtol=1e-5, atol=1e-5)
    rows = kernel.block_rows(T * k, E)
    assert used == sum(-(-count // rows) for count in np.bincount(experts.ravel(), minlength=E))


def test_a_token_that_holds_nan_stays_alone():
    x = np.ones((9, K), np.float32)
    x[4] = np.nan
    experts = np.tile(np.asarray([1, 3], np.int32), (9, 1))
    got, _ = mixture(x, experts, np.full((9, 2), 0.5, np.float32))
    assert np.isnan(got[4]).all()
    assert np.isfinite(np.delete(np.asarray(got), 4, axis=0)).all()


@pytest.mark.parametrize(("pairs", "count", "rows"), [(2, 8, 8), (64, 8, 16), (1024, 8, 128), (8192, 128, 128)])
def test_blocks_are_about_two_shares_of_an_expert(pairs, count, rows):
    assert kernel.block_rows(pairs, count) == rows
