"""The kernels on a processor of another kind: compiled for aarch64, and run by QEMU."""

import shutil
import subprocess
from pathlib import Path

import pytest

from atoma_jax.native import build
from tests.native.conftest import HOLD, OWN_TESTS

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The kernels' own tests. Emulation is slow, so the compiler does what it can."""
    for command, package in ((COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        # `.ci/run` has neither: a compiler for another processor, and minutes of emulation.
        if shutil.which(command) is None:
            pytest.skip(f"{command} (Debian's package {package}) is not installed")
    monkeypatch.setenv("CXX", COMPILER)
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    return build.build_programs(OWN_TESTS, tmp_path, "-static")


@pytest.mark.slow
def test_the_portable_variant_holds(programs: list[Path]) -> None:
    for program in programs:
        done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.strip() == HOLD
