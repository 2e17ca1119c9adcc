"""`QTensor` behaves as one array with static geometry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atoma_jax.quant.qtensor import QTensor, planar_plane


def rows_tensor(layers: int = 0, mins: bool = True) -> QTensor:
    lead = (layers,) if layers else ()
    return QTensor(
        codes=jnp.arange(max(layers, 1) * 4 * 64, dtype=jnp.int32).astype(jnp.int8).reshape(*lead, 4, 2, 32),
        scales=jnp.ones((*lead, 4, 2), jnp.float32),
        mins=jnp.zeros((*lead, 4, 2), jnp.float32) if mins else None,
        scale_supers=None,
        min_supers=None,
        permutation=None,
        layout="rows",
        shape=(4, 64),
        group=32,
        bits=8,
        zero=0,
        table=None,
        plane=0,
    )


def test_bytes_are_those_of_all_children():
    assert rows_tensor().nbytes == 4 * 64 + 2 * 4 * 2 * 4
    assert rows_tensor(mins=False).nbytes == 4 * 64 + 4 * 2 * 4


def test_a_scan_over_stacked_layers_sees_one_layer_at_a_time():
    stacked = rows_tensor(layers=3)

    def layer(total, weight):
        assert weight.codes.shape == (4, 2, 32)
        assert (weight.shape, weight.group, weight.layout) == ((4, 64), 32, "rows")
        return total + weight.codes.astype(jnp.int32).sum(), weight.codes[0, 0, 0]

    total, firsts = jax.lax.scan(layer, jnp.int32(0), stacked)
    assert total == np.asarray(stacked.codes, np.int32).sum()
    np.testing.assert_array_equal(firsts, stacked.codes[:, 0, 0, 0])


def test_geometry_is_part_of_a_programs_key_and_values_are_not():
    traced = []
    run = jax.jit(lambda weight: traced.append(weight.group))
    run(rows_tensor())
    run(rows_tensor())
    run(rows_tensor(mins=False))
    assert len(traced) == 2


@pytest.mark.parametrize(
    ("K", "group", "bits", "plane"),
    [
        (256, 32, 4, 32),
        (512, 16, 8, 16),
        (576, 32, 8, 32),
        (576, 32, 4, 16),
        (128, 128, 8, 64),
        (480, 32, 4, None),
        (32, 8, 8, None),
    ],
)
def test_planes_divide_groups_and_fill_words(K, group, bits, plane):
    assert planar_plane(K, group, bits) == plane
