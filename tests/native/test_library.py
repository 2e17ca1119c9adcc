"""What is loaded fits: libraries of other sources or another FFI, and no library at all, are refused by name."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from atoma_jax.cores import _quota, usable_cores
from atoma_jax.native import build, library
from atoma_jax.native.build import takes
from atoma_jax.native.library import VARIANTS, Library, UnfitError, load
from atoma_jax.native.probe import probe


def stamped(path: Path, sources: str, ffi: str) -> Path:
    path.write_bytes(b"\x7fELF" + f"atoma-native sources={sources} ffi={ffi}".encode() + b"\0")
    return path


def test_no_library_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UnfitError, match=r"none\.so is missing.*python -m atoma_jax\.native\.build"):
        load(tmp_path / "none.so")


def test_a_library_of_other_sources_is_refused_before_it_runs(tmp_path: Path) -> None:
    with pytest.raises(UnfitError, match="was not built from the sources beside it"):
        load(stamped(tmp_path / "old.so", "0" * 32, "0.3"))


def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.so"
    path.write_bytes(b"\x7fELF something else")
    with pytest.raises(UnfitError, match="was not built from the sources"):
        load(path)


@pytest.mark.parametrize("ffi", ["1.0", "0.99"])
def test_a_library_for_a_newer_ffi_is_refused_by_both_versions(tmp_path: Path, ffi: str) -> None:
    with pytest.raises(UnfitError, match=rf"version {ffi} of XLA's FFI, and this jaxlib has 0\.\d"):
        load(stamped(tmp_path / "new.so", build.source_digest(), ffi))


def test_a_library_that_does_not_load_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnfitError, match="does not load on this machine"):
        load(stamped(tmp_path / "broken.so", build.source_digest(), "0.1"))


@pytest.mark.parametrize(
    ("running", "built", "fits"),
    [((0, 3), (0, 3), True), ((0, 5), (0, 3), True), ((0, 3), (0, 4), False), ((1, 3), (0, 3), False)],
)
def test_older_minor_versions_of_the_ffi_run(running: tuple[int, int], built: tuple[int, int], fits: bool) -> None:
    assert takes(running, built) is fits


def test_the_reason_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "none.so")
    library.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert library.library() is None
            assert library.library() is None
        (record,) = caplog.records
        assert "native kernels are off, and XLA computes instead" in record.message
    finally:
        library.library.cache_clear()


def test_a_program_runs_with_the_variant_and_the_threads_of_this_machine(kernels: Library) -> None:
    assert kernels.supported_variants()[0] == "portable"
    assert kernels.variant == kernels.supported_variants()[-1]  # the best
    assert np.asarray(probe()).tolist() == [VARIANTS.index(kernels.variant), usable_cores()]
    with kernels.forced(variant="portable", threads=3):
        assert np.asarray(probe()).tolist() == [0, 3]
    assert np.asarray(probe()).tolist() == [VARIANTS.index(kernels.variant), usable_cores()]


def test_without_a_compiler_the_build_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    monkeypatch.setattr(build, "is_current", lambda *_: False)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler \(a-compiler-that-is-not-there\)"):
        build.build(tmp_path / "lib.so")
    assert not (tmp_path / "lib.so").exists()


def test_a_compiler_that_fails_leaves_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho this machine is out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setattr(build, "is_current", lambda *_: False)
    with pytest.raises(build.BuildError, match="this machine is out of order"):
        build.build(tmp_path / "lib.so")
    assert not (tmp_path / "lib.so").exists()


def test_a_changed_source_makes_the_library_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = tmp_path / "src"
    shutil.copytree(build.SOURCES, copied)
    before = build.source_digest()
    monkeypatch.setattr(build, "SOURCES", copied)
    assert build.source_digest() == before
    with (copied / "pool.cc").open("a") as file:
        file.write("// changed\n")
    assert build.source_digest() != before


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({}, None),
        ({"cpu.max": "garbage"}, None),
    ],
)
def test_a_containers_share_of_processor_time_bounds_the_threads(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _quota(tmp_path) == quota
