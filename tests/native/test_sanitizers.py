"""The kernels by themselves under AddressSanitizer and UBSan: no byte out of bounds, nothing undefined."""

import subprocess
from pathlib import Path

import pytest

from atoma_jax.native.build import BuildError, build_programs, compiler
from tests.native.conftest import HOLD, OWN_TESTS

# Not optimized: that would take five times as long to compile as it saves.
SANITIZERS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    try:
        compiler()
    except BuildError as error:
        pytest.skip(str(error))
    built = build_programs(OWN_TESTS, tmp_path_factory.mktemp("programs"), *SANITIZERS)
    return {program.name: program for program in built}


@pytest.mark.slow
@pytest.mark.parametrize("name", [main.stem for main in OWN_TESTS])
def test_every_variant_and_the_pool_hold(name: str, programs: dict[str, Path]) -> None:
    done = subprocess.run([str(programs[name])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == HOLD
