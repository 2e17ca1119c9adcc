"""The kernels on a processor of another kind: compiled for aarch64, and run by QEMU."""

import shutil
import subprocess
from pathlib import Path

import pytest

from atoma_jax.native import build

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The kernels' own tests. Emulation is slow, so the compiler does what it can."""
    for command, package in ((COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if shutil.which(command) is None:
            pytest.skip(f"{command} (Debian's package {package}) is not installed")
    monkeypatch.setenv("CXX", COMPILER)
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    mains = [Path(__file__).with_name(f"{name}.cc") for name in ("kernels_test", "attention_test")]
    return build.build_programs(mains, tmp_path, "-static")


@pytest.mark.slow
def test_the_portable_variant_holds(programs: list[Path]) -> None:
    for program in programs:
        done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.strip() == "all kernels hold"
