"""What the tuner starts from."""

import jax
import pytest

from bench.tune.subjects import Subject, subjects
from pallas_kernels.tuning import SCALED_WEIGHTS, MatmulTiles


@pytest.fixture(scope="module")
def by_name() -> dict[str, Subject]:
    return {subject.name: subject for subject in subjects(small=False)}


@pytest.mark.parametrize("rows", [8, 16])
def test_rows_whose_default_scales_weights_are_also_tried_with_tiles_that_scale_sums(by_name, rows):
    subject = by_name[f"Q4_K, {rows} × 4096 → 28672"]
    default = subject.default("")
    assert isinstance(default, MatmulTiles)
    assert default.block_m >= SCALED_WEIGHTS
    assert subject.others
    for tiles in subject.others:
        assert isinstance(tiles, MatmulTiles)
        assert tiles.block_m < SCALED_WEIGHTS
        assert subject.takes(tiles)


@pytest.mark.parametrize("name", ["Q4_K, 1 × 4096 → 28672", "Q4_K, 64 × 4096 → 28672", "bf16, 8 × 4096 → 28672"])
def test_others_start_from_their_defaults_alone(by_name, name):
    assert by_name[name].others == ()


def test_what_it_tries_is_a_product():
    """The small subject runs interpreted."""
    [subject] = subjects(small=True)
    run = jax.jit(subject.run(subject.default("")))
    assert run(jax.numpy.int32(0), *subject.arguments()).shape == (1, 128)
