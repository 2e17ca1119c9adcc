"""The kernels by themselves under AddressSanitizer and UBSan: no byte out of bounds, nothing undefined."""

import subprocess
from pathlib import Path

import pytest

from atoma_jax.native.build import BuildError, build_program, compiler

SANITIZERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


@pytest.mark.slow
@pytest.mark.parametrize("source", ["kernels_test.cc", "attention_test.cc"])
def test_every_variant_and_the_pool_hold(source: str, tmp_path: Path) -> None:
    try:
        compiler()
    except BuildError as error:
        pytest.skip(str(error))
    program = build_program(Path(__file__).with_name(source), tmp_path / "program", *SANITIZERS)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "all kernels hold"
