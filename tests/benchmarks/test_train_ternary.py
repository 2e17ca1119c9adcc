"""The ternary model is trained as it will be served, and a run that was stopped ends where it would have ended."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.ternary.export import freeze, read_folder, shared_precision
from bench.ternary.model import (
    Shape,
    as_ternary,
    forward,
    initial_weights,
    int8_activations,
    mean_nll,
    ternary,
)
from bench.ternary.text import BOS_ID, all_windows, random_windows
from bench.train_ternary import Recipe, Run
from tests.models.bitnet_reference import EDGE, BitNetReference

pytestmark = pytest.mark.optimized  # hundreds of steps

FOLDER = Path(__file__).parents[1] / "data" / "ternary" / "hf"
TINY = Shape(V=32, D=16, F=24, L=1, N=2, K=1, H=8, context=8)
TOKENS = np.random.default_rng(3).integers(2, TINY.V, 400).astype(np.int32)
REPEATED = np.tile(TOKENS[:8], 20)  # easily learnt
RECIPE = Recipe(
    steps=30,
    anneal_from=20,
    horizon=100,
    batch=2,
    peak_rate=0.01,
    last_rate=0.1,
    warm_up=1,
    weight_decay=0.1,
    largest_gradient=1.0,
    seed=5,
    quantized=True,
)


class StopHereError(Exception):
    """What a test stops a run with."""


def stop_after_saving(run: Run, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains until the checkpoint at `at`, and not a step further."""
    save = Run.save

    def save_and_stop(run: Run) -> None:
        save(run)
        raise StopHereError

    with monkeypatch.context() as patched:
        patched.setattr(Run, "save", save_and_stop)
        with pytest.raises(StopHereError):
            run.train(at, REPEATED)


@pytest.mark.slow
def test_training_lowers_the_loss_and_a_resumed_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    whole = Run.start(RECIPE, TINY, REPEATED, tmp_path / "whole")
    inputs, targets = all_windows(REPEATED, TINY.context)
    before = float(mean_nll(as_ternary(whole.weights, TINY), inputs, targets, TINY))
    whole.train(RECIPE.steps, REPEATED)
    after = float(mean_nll(as_ternary(whole.weights, TINY), inputs, targets, TINY))
    assert after < before - 1

    stop_after_saving(Run.start(RECIPE, TINY, REPEATED, tmp_path / "parts"), 25, monkeypatch)
    resumed = Run.start(RECIPE, TINY, REPEATED, tmp_path / "parts")
    assert resumed.done == 25
    resumed.train(RECIPE.steps, REPEATED)
    for name, expected in whole.weights.items():
        np.testing.assert_array_equal(resumed.weights[name], expected, err_msg=name)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    run = Run.start(RECIPE, TINY, TOKENS, tmp_path / "run")
    run.done = RECIPE.anneal_from + 1
    run.save()
    for change in ({"seed": 6}, {"steps": 40}, {"anneal_from": 25}):
        with pytest.raises(Exception, match="other settings"):
            Run.start(replace(RECIPE, **change), TINY, TOKENS, tmp_path / "run")


def test_a_checkpoint_of_the_first_stage_serves_any_second_stage(tmp_path):
    run = Run.start(RECIPE, TINY, TOKENS, tmp_path / "run")
    run.done = RECIPE.anneal_from
    run.save()
    assert Run.start(replace(RECIPE, steps=40, anneal_from=25), TINY, TOKENS, tmp_path / "run").done == run.done
    with pytest.raises(Exception, match="other settings"):
        Run.start(replace(RECIPE, seed=6), TINY, TOKENS, tmp_path / "run")
    # A run whose second stage should have begun before took other steps.
    with pytest.raises(Exception, match="other settings"):
        Run.start(replace(RECIPE, anneal_from=10), TINY, TOKENS, tmp_path / "run")


@pytest.mark.slow  # compiles the training step
def test_weights_are_three_values_a_matrix_and_gradients_pass_through():
    w = initial_weights(TINY, 0)["model.layers.0.mlp.up_proj.weight"]
    codes, scale = ternary(w)
    assert set(np.unique(np.asarray(codes))) == {-1.0, 0.0, 1.0}
    assert float(scale) == pytest.approx(float(np.abs(np.asarray(w)).mean()))
    name = "model.layers.0.mlp.up_proj.weight"
    weights = initial_weights(TINY, 0)
    inputs, targets = all_windows(TOKENS[:16], TINY.context)
    gradients = jax.jit(jax.grad(lambda x: mean_nll(as_ternary(x, TINY), inputs, targets, TINY)))
    of_the_rounded = jax.jit(jax.grad(lambda x: mean_nll(x, inputs, targets, TINY)))
    through = gradients(weights)[name]
    at_the_rounded = of_the_rounded(jax.jit(partial(as_ternary, shape=TINY))(weights))[name]
    np.testing.assert_allclose(through, at_the_rounded, rtol=1e-4, atol=1e-7)


def test_activations_round_half_to_even_on_255_steps():
    x = jnp.array([[127.0, 0.5, 1.5, -2.5, 3.2], [0.0, 0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(int8_activations(x), [[127.0, 0.0, 2.0, -2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])


def test_what_is_written_is_exact_in_both_16_bit_formats():
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32) * np.logspace(-9, 3, 4096, dtype="f4")
    kept = shared_precision(values)
    np.testing.assert_array_equal(kept.astype(np.float16).astype(np.float32), kept)
    np.testing.assert_array_equal(jnp.asarray(kept, jnp.bfloat16).astype(jnp.float32), kept)
    np.testing.assert_allclose(kept, values, rtol=2**-8, atol=2**-25)


def test_freezing_changes_codes_not_at_all_and_scales_by_a_bfloat16_rounding():
    weights = {name: np.asarray(w) for name, w in initial_weights(TINY, 1).items()}
    frozen, seen = freeze(weights, TINY), as_ternary(initial_weights(TINY, 1), TINY)
    for name in TINY.matrices():
        np.testing.assert_array_equal(np.sign(frozen.values()[name]), np.sign(np.round(seen[name], 6)))
        np.testing.assert_allclose(frozen.values()[name], seen[name], rtol=2**-8, atol=1e-6)


def test_the_trained_arithmetic_is_the_references():
    """Where no rounding is on edge, float32 in JAX and float64 in numpy agree on the committed model."""
    frozen, shape, tokenizer = read_folder(FOLDER)
    ids = np.array(tokenizer.encode("Paul, a servant of Jesus Christ, called to be an apostle").ids)
    expected = BitNetReference(FOLDER).forward(ids)
    found = np.asarray(jax.jit(partial(forward, shape=shape))(frozen.values(), jnp.asarray(ids)[None]))[0]
    settled = expected.edge > EDGE
    assert settled.any()
    np.testing.assert_allclose(found[settled], expected.logits[settled], rtol=0, atol=2e-5)


def test_windows_start_with_bos_and_depend_on_the_step_alone():
    inputs, targets = random_windows(TOKENS, count=3, length=8, seed=1, step=7)
    assert (inputs[:, 0] == BOS_ID).all()
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    again, _ = random_windows(TOKENS, count=3, length=8, seed=1, step=7)
    other, _ = random_windows(TOKENS, count=3, length=8, seed=1, step=8)
    np.testing.assert_array_equal(inputs, again)
    assert (inputs != other).any()
