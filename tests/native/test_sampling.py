"""Draws from rows of logits: every variant against float64 and sorting, for every filter and shape of a vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atoma_jax.native import sampling
from atoma_jax.native.library import Library

DRAWS = 4096
SIZES = (1, 5, 127, 128, 129, 1000, 49155)
SETTINGS: tuple[dict[str, float], ...] = (
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"temperature": 1e-30},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 600},
    {"top_k": 2**31 - 1},
    {"top_p": 0.8},
    {"top_p": 1e-9},
    {"top_p": 0.9999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.9},
    {"top_k": 40, "top_p": 0.5, "min_p": 0.05, "temperature": 2.0},
)

draw, survey = jax.jit(sampling.draw), jax.jit(sampling.survey)


def rows_of_every_shape(V: int) -> np.ndarray:
    rng = np.random.default_rng(V)
    normal = rng.standard_normal(V) * 3
    ties = rng.integers(-3, 3, V).astype(float)
    peak = np.full(V, -8.0)
    peak[V // 3] = 10.0
    barred = np.where(rng.random(V) < 0.7, -np.inf, normal)
    barred[V // 2] = 1.0
    zipf = -1.5 * np.log(rng.permutation(V) + 1.0)
    return np.stack([normal, ties, np.zeros(V), peak, barred, zipf, normal * 100 - 1000]).astype(np.float32)


def floor_of(logits: np.ndarray, settings: dict[str, float]) -> np.float32:
    """Below which min-p keeps nothing, where one row has it."""
    if "min_p" not in settings:
        return np.float32(-np.inf)
    return np.float32(logits.max() + settings.get("temperature", 1.0) * np.log(settings["min_p"]))


def drawn(logits: np.ndarray, bits: np.ndarray, **settings: Any) -> np.ndarray:
    """A token for each of `bits`, from one row, or from as many."""
    B, floor = len(bits), floor_of(logits, settings)
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "active": True, **settings, "floor": floor}
    given.pop("min_p", None)
    types = {"top_k": jnp.int32, "active": jnp.bool_}
    arrays = {name: jnp.full(B, value, types.get(name, jnp.float32)) for name, value in given.items()}
    rows = jnp.broadcast_to(jnp.asarray(logits), (B, logits.shape[-1]))
    return np.asarray(draw(rows, top=jnp.max(rows, axis=1), bits=jnp.asarray(bits, jnp.uint32), **arrays))


def kept_probabilities(logits: np.ndarray, settings: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """In float64, by sorting; and those of tokens that rounding may or may not keep."""
    x = logits.astype(np.float64)
    weights = np.exp((x - x.max()) / settings.get("temperature", 1.0))
    kept = logits >= floor_of(logits, settings)
    if 0 < settings.get("top_k", 0) < len(x):
        kept &= logits >= np.sort(np.where(kept, x, -np.inf))[-int(settings["top_k"])]
    unsure = np.zeros_like(kept)
    if settings.get("top_p", 1.0) < 1:
        share = np.where(kept, weights, 0)
        order = np.argsort(-np.where(kept, x, -np.inf), kind="stable")
        running = np.cumsum(share[order]) / share.sum()
        ends = [order[min(np.searchsorted(running, settings["top_p"] + e), len(x) - 1)] for e in (-1e-5, 1e-5)]
        unsure = (logits < logits[ends[0]]) & (logits >= logits[ends[1]])
        kept &= logits >= logits[ends[1]]
    probs = np.where(kept, weights, 0)
    return probs / probs.sum(), unsure


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_evenly_spaced_numbers_draw_each_token_as_often_as_it_is_likely(
    variant: str, settings: dict[str, float]
) -> None:
    bits = (np.arange(DRAWS, dtype=np.uint64) * 2**32 // DRAWS).astype(np.uint32)
    for V in SIZES[:-1]:
        for logits in rows_of_every_shape(V):
            probs, unsure = kept_probabilities(logits, settings)
            counts = np.bincount(drawn(logits, bits, **settings), minlength=V)
            assert len(counts) == V
            assert not counts[(probs == 0) & ~unsure].any(), "a token outside the filters was drawn"
            # Tokens lie one behind the other: each gets what it is due but for one at either end.
            slack = 1.01 + DRAWS * (probs[unsure].sum() + 1e-5)
            assert np.abs(counts - DRAWS * probs)[~unsure].max() <= slack


def test_a_large_vocabulary_keeps_what_a_sorted_row_keeps(variant: str) -> None:
    V, rng = SIZES[-1], np.random.default_rng(5)
    bits = rng.integers(0, 2**32, 64, dtype=np.uint32)
    for logits in rows_of_every_shape(V):
        for settings in SETTINGS:
            probs, unsure = kept_probabilities(logits, settings)
            tokens = drawn(logits, bits, **settings)
            assert ((probs[tokens] > 0) | unsure[tokens]).all(), settings
            # Where these numbers fall in the sums of float64.
            ends = np.cumsum(probs)
            slack = 1e-4 + 2 * probs[unsure].sum()
            at = (bits / 2.0**32)[:, None] + np.array([-slack, slack])
            first, last = np.searchsorted(ends, np.clip(at, 0, 1 - 1e-12)).T
            assert ((tokens >= first) & (tokens <= last)).all(), settings


def test_a_row_is_the_same_in_any_batch_and_on_any_number_of_threads(kernels: Library) -> None:
    logits = rows_of_every_shape(1000)
    bits = np.random.default_rng(1).integers(0, 2**32, len(logits), dtype=np.uint32)
    together = drawn(logits, bits, top_k=50, top_p=0.9, temperature=0.8)
    for threads in (1, 2, 5):
        with kernels.forced(threads=threads):
            for row, value in enumerate(together):
                assert drawn(logits[row], bits[row : row + 1], top_k=50, top_p=0.9, temperature=0.8) == value
            np.testing.assert_array_equal(drawn(logits, bits, top_k=50, top_p=0.9, temperature=0.8), together)


def test_rows_that_are_not_active_give_zeros_whatever_they_hold(variant: str) -> None:
    logits = np.full((2, 300), np.nan, np.float32)
    logits[1] = 0
    logits[1, 17] = 100
    assert drawn(logits, np.zeros(2, np.uint32), active=np.array([False, True])).tolist() == [0, 17]


@pytest.mark.parametrize("V", SIZES)
def test_sums_and_ranks_are_those_of_float64(variant: str, V: int) -> None:
    logits = rows_of_every_shape(V)
    B, top = len(logits), logits.max(axis=1)
    tokens = np.random.default_rng(2).integers(0, V, B).astype(np.int32)
    norms, ranks = survey(logits, top=top, tokens=tokens, active=np.ones(B, bool))
    x = logits.astype(np.float64)
    wanted = top + np.log(np.exp(x - top[:, None]).sum(axis=1))
    np.testing.assert_allclose(norms, wanted, rtol=2e-7, atol=2e-6)
    own = logits[np.arange(B), tokens][:, None]
    before = (logits > own) | ((logits == own) & (np.arange(V) < tokens[:, None]))
    np.testing.assert_array_equal(ranks, 1 + before.sum(axis=1))
    nothing = survey(logits, top=top, tokens=tokens, active=np.zeros(B, bool))
    assert not np.any(nothing)


def test_arrays_that_do_not_belong_together_are_refused(kernels: Library) -> None:
    row, flag = jnp.zeros(3), jnp.zeros(3, bool)
    whole, result = jnp.zeros(3, jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    call = jax.ffi.ffi_call("atoma_draw", result)
    with pytest.raises(Exception, match=r"must be \[rows\]"):
        jax.block_until_ready(call(jnp.zeros((2, 9)), row, row, row, whole, row, whole.astype(jnp.uint32), flag))
    call = jax.ffi.ffi_call("atoma_survey", (jax.ShapeDtypeStruct((2,), jnp.float32), result))
    with pytest.raises(Exception, match=r"must be \[rows\]"):
        jax.block_until_ready(call(jnp.zeros((2, 9)), row, whole, flag))
