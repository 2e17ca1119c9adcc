"""The kernels' own tests on an emulated processor with AVX-512 VNNI, for machines that have none."""

from pathlib import Path

import pytest

from atoma_jax.native.build import BuildError, build_programs
from tests.native import emulated

PROGRAMS = ("kernels_test", "attention_test")
PATIENCE = 1800  # seconds; attention takes a thousand times as long as on a processor


@pytest.mark.slow
def test_the_variant_holds(tmp_path: Path) -> None:
    if lacking := emulated.missing():
        pytest.skip(lacking)
    mains = [Path(__file__).with_name(f"{name}.cc") for name in PROGRAMS]
    (tmp_path / "programs").mkdir()
    try:
        programs = build_programs(mains, tmp_path / "programs", "-static")
    except BuildError as error:
        pytest.skip(str(error))
    said = emulated.said_by(programs, tmp_path, timeout=PATIENCE)
    assert "avx512_vnni" in said, "or else it was another variant that ran"
    assert said.count("all kernels hold") == len(PROGRAMS), said[-2000:]
    assert said.count("ended with 0") == len(PROGRAMS), said[-2000:]
