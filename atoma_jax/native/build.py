"""Compiles the kernels: `python -m atoma_jax.native.build`. Imports nothing of ours and no JAX: `setup.py` runs it.

Each source is compiled on its own and at once with the others, then linked to `libatoma_native.so` in this folder. A
file `*_avx2.cc`, `*_avx512.cc` or `*_avx512bf16.cc` is compiled with those instructions, and nobody calls what is in it
where the CPU has none (`src/variant.h`). The library carries a stamp: the digest of its sources, and the version of
XLA's FFI that it was built for. What does not fit is built anew here, and never loaded by `library.py`.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = FOLDER / "src"
LIBRARY = FOLDER / "libatoma_native.so"

FLAGS = (
    *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-pthread"),
    "-ffp-contract=off",  # sums are made as they are written, in every variant and for any number of rows
    *("-Wall", "-Wno-psabi"),  # vectors are passed between functions of one file alone
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # of GCC 12's own headers
)
VARIANT_FLAGS = {
    "avx2": _AVX2,
    "avx512": (*_AVX2, *_AVX512),
    "avx512bf16": (*_AVX2, *_AVX512, "-mavx512bf16"),
}
# The C++ runtime inside: the library has no needs that a machine with another compiler might not meet.
LINK_FLAGS = ("-shared", "-pthread", "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-s")


class BuildError(Exception):
    """The library cannot be built here; the message says why."""


def source_digest() -> str:
    """Of all files that the library is made of, and of how it is made."""
    digest = hashlib.sha256()
    for path in (*sorted(SOURCES.iterdir()), Path(__file__)):
        if path.suffix in (".cc", ".h", ".py"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a library says of itself, in its file: nothing of it runs before that is known to fit."""

    sources: str
    ffi: tuple[int, int]

    @classmethod
    def of(cls, library: Path) -> "Stamp | None":
        """None: it has none, so it is not one of ours."""
        found = re.search(rb"atoma-native sources=([0-9a-f]{32}) ffi=(\d+)\.(\d+)\0", library.read_bytes())
        return None if found is None else cls(found[1].decode(), (int(found[2]), int(found[3])))


def ffi_version(include: Path) -> tuple[int, int]:
    """Major and minor version of XLA's FFI, from a jaxlib's headers.

    Raises:
        BuildError: they do not say.
    """
    header = include / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text(encoding="utf-8")
    except OSError as error:
        raise BuildError(f"jaxlib's header {header} cannot be read ({error})") from error
    found = [re.search(rf"^#define XLA_FFI_API_{part} (\d+)$", text, re.MULTILINE) for part in ("MAJOR", "MINOR")]
    if found[0] is None or found[1] is None:
        raise BuildError(f"jaxlib's header {header} does not say which version of the FFI it is")
    return int(found[0][1]), int(found[1][1])


def compiler() -> str:
    """The C++ compiler: that of `CXX`, or the first that is installed.

    Raises:
        BuildError: there is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise BuildError(f"no C++ compiler ({', '.join(names)})")
    return found


def include_folder() -> Path:
    """XLA's FFI headers, which jaxlib brings (`jax.ffi.include_dir()`, found without importing JAX).

    Raises:
        BuildError: jaxlib is not installed.
    """
    found = importlib.util.find_spec("jaxlib")
    if found is None or found.origin is None:
        raise BuildError("jaxlib, whose headers the kernels need, is not installed")
    return Path(found.origin).parent / "include"


def flags_of(source: Path) -> tuple[str, ...]:
    """What a source is compiled with beyond `FLAGS`."""
    return VARIANT_FLAGS.get(source.stem.rpartition("_")[2], ())


def sources() -> list[Path]:
    """The sources for this machine's kind of processor, the slowest first."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    found = [path for path in SOURCES.glob("*.cc") if is_x86 or not flags_of(path)]
    return sorted(found, key=lambda path: (not flags_of(path), path.name))


def takes(running: tuple[int, int], built: tuple[int, int]) -> bool:
    """Whether a jaxlib runs handlers: those of its own version of the FFI and of minor ones before it."""
    return built[0] == running[0] and built[1] <= running[1]


def is_current(library: Path = LIBRARY) -> bool:
    """Whether it is there, of these sources, and for a version of the FFI that this jaxlib runs."""
    stamp = Stamp.of(library) if library.exists() else None
    return stamp is not None and stamp.sources == source_digest() and takes(ffi_version(include_folder()), stamp.ffi)


def build_programs(mains: Sequence[Path], folder: Path, *flags: str) -> list[Path]:
    """Compiles the kernels without their handlers, once, and links them to programs; for tests.

    Args:
        mains: the source of each program.
        folder: where they go, under the names of their sources.
        flags: beyond those of the library.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    kernels = [path for path in sources() if path.stem != "library" and not path.stem.endswith("_handler")]
    with tempfile.TemporaryDirectory(prefix="atoma-native-") as scratch:
        objects = _compile((*kernels, *mains), Path(scratch), flags)
        programs = [folder / main.stem for main in mains]
        for program, own in zip(programs, objects[len(kernels) :], strict=True):
            _run(compiler(), *objects[: len(kernels)], own, "-pthread", *flags, "-o", str(program))
    return programs


def build(target: Path = LIBRARY) -> Path:
    """Compiles and links, unless what is there is current. The library appears whole or not at all.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    if is_current():
        return target if target == LIBRARY else _put(LIBRARY, target)
    include = include_folder()
    stamp = f'-DATOMA_SOURCES="{source_digest()}"'
    with tempfile.TemporaryDirectory(prefix="atoma-native-") as scratch:
        objects = _compile(sources(), Path(scratch), ("-isystem", str(include)), {"library": stamp})
        linked = Path(scratch) / target.name
        _run(compiler(), *LINK_FLAGS, *objects, "-o", str(linked))
        return _put(linked, target)


def _compile(
    files: Sequence[Path], scratch: Path, flags: Sequence[str], own: Mapping[str, str] | None = None
) -> list[str]:
    """Object files, made at once. `own` are flags of single files, by their stems."""
    command = compiler()

    def compiled(source: Path) -> str:
        output = str(scratch / f"{source.stem}.o")
        extra = [flag for stem, flag in (own or {}).items() if stem == source.stem]
        places = ("-I", str(SOURCES), "-c", str(source), "-o", output)
        _run(command, *FLAGS, *flags_of(source), *flags, *extra, *places)
        return output

    with ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(compiled, files))


def _put(library: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(library, beside)
    beside.replace(target)
    return target


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")


def main() -> None:
    """For the command line."""
    try:
        build()
    except BuildError as error:
        sys.exit(f"the native kernels were not built: {error}")


if __name__ == "__main__":
    main()
