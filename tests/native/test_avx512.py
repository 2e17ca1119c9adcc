"""The kernels' own tests on an emulated processor with AVX-512, for machines that have none."""

from pathlib import Path

import pytest

from atoma_jax.native.build import build_programs
from tests.native import emulated
from tests.native.conftest import HOLD, OWN_TESTS

PATIENCE = 1800  # seconds; attention takes a hundred times as long as on a processor


@pytest.mark.slow
def test_the_variants_hold(tmp_path: Path) -> None:
    # An emulator and a kernel are no part of `.ci/run`, whose machine need not be able to boot anything.
    if lacking := emulated.missing():
        pytest.skip(lacking)
    (tmp_path / "programs").mkdir()
    programs = build_programs(OWN_TESTS, tmp_path / "programs", "-static")
    said = emulated.said_by(programs, tmp_path, timeout=PATIENCE)
    for feature in emulated.features():
        assert feature in said, "or else it was another variant that ran"
    assert said.count(HOLD) == len(programs), said[-2000:]
    assert said.count("ended with 0") == len(programs), said[-2000:]
