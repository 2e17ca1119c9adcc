"""What a user installs is whole: the wheel's content, its metadata, and a generation from nothing but the wheel."""

import email
import json
import os
import subprocess
import sys
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = ("atoma_jax", "pallas_kernels", "sharding", "configs")
# pip's words where no registry answers; every other failure of pip is one of ours.
NO_REGISTRY = ("NewConnectionError", "NameResolutionError", "Name or service not known", "ConnectTimeout", "ProxyError")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built as `make wheel` does."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), str(ROOT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_wheel_holds_the_four_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(SHIPPED)


def test_wheel_holds_every_source_and_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    kinds = {".py", ".toml", ".cc", ".h", ".typed", ".npz", ".ggml", ".html", ".css", ".js", ".svg"}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in SHIPPED
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix in kinds
    }
    assert expected - inside == set()


def test_wheel_holds_the_native_kernels_for_any_python_of_this_platform(wheel: Path) -> None:
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
    assert libraries == ["atoma_jax/native/libatoma_native.so"]


def test_wheel_holds_no_model_and_no_other_build_product(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert [name for name in names if name.endswith((".gguf", ".safetensors", ".pyc", ".o"))] == []


def test_metadata_states_licence_python_and_extras(metadata: Message, wheel: Path) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    extras = {"bench", "clients", "cuda12", "cuda13", "dev", "gate", "oracle", "otel", "ray", "server"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = (name for name in archive.namelist() if name.endswith("/licenses/LICENSE"))
        assert "Apache License" in archive.read(licence).decode()
        (of_ggml,) = (
            name for name in archive.namelist() if name.endswith("/licenses/atoma_jax/quant/data/LICENSE.ggml")
        )
        assert "MIT License" in archive.read(of_ggml).decode()


def test_jax_has_the_same_bounds_in_every_extra(metadata: Message) -> None:
    bounds = {
        requirement.split(";")[0].split("]")[-1].removeprefix("jax").strip()
        for requirement in metadata.get_all("Requires-Dist", [])
        if requirement.startswith(("jax<", "jax>", "jax["))
    }
    assert bounds == {"<0.13,>=0.10.2"}


@pytest.mark.slow
@pytest.mark.model
def test_wheel_generates_from_another_folder_in_a_clean_environment(
    wheel: Path, smollm2_path: Path, tmp_path: Path
) -> None:
    """Finds what an editable install hides: a module or data file left out, a dependency that only tests declare."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    installed = run(str(binaries / "python"), "-m", "pip", "install", "--quiet", str(wheel))
    if any(word in installed.stderr for word in NO_REGISTRY):
        pytest.skip("no package registry answers, so the wheel's dependencies cannot be installed")
    assert installed.returncode == 0, installed.stderr

    found = run(str(binaries / "python"), "-c", "import atoma_jax; print(atoma_jax.__file__)")
    assert found.stdout.startswith(str(tmp_path / "venv")), found.stderr

    program = str(binaries / "atoma-jax")
    arguments = ["--model", str(smollm2_path), "--prompt", "The capital of France is", "--temperature", "0"]
    done = run(program, "generate", *arguments, "--max-tokens", "4", "--json")
    assert done.returncode == 0, done.stderr
    assert "Paris" in json.dumps(json.loads(done.stdout))
