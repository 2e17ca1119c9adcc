"""Compiles the kernels: `python -m atoma_jax.native.build`. Imports nothing of ours and no JAX: `setup.py` runs it, too.

Each source is compiled on its own and at once with the others, then linked to `libatoma_native.so` in this folder. A file
`*_avx2.cc` or `*_avx512.cc` is compiled with those instructions and must not be called where the CPU has none
(`src/variant.h`). The library carries a digest of the sources: one that was made of others is not loaded, and is made
anew here.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = FOLDER / "src"
LIBRARY = FOLDER / "libatoma_native.so"

FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-ffp-contract=off",
    "-pthread",
    "-Wall",
)
VARIANT_FLAGS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx2", "-mfma", "-mf16c"),
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512"),
    ),
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


def build(target: Path = LIBRARY) -> Path:
    """Compiles and links. The library appears whole or not at all.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    command, include = compiler(), include_folder()
    digest = source_digest()
    with tempfile.TemporaryDirectory(prefix="atoma-native-") as scratch:
        # setuptools' isolated builds may have fewer cores than files: one thread a file leaves that to the system.
        with ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0)))) as pool:

            def compiled(source: Path) -> str:
                output = Path(scratch) / f"{source.stem}.o"
                defines = (f'-DATOMA_SOURCES="{digest}"',)
                places = ("-isystem", str(include), "-I", str(SOURCES))
                _run(command, *FLAGS, *flags_of(source), *defines, *places, "-c", str(source), "-o", str(output))
                return str(output)

            objects = list(pool.map(compiled, sources()))
        linked = Path(scratch) / target.name
        _run(command, *LINK_FLAGS, *objects, "-o", str(linked))
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy2(linked, beside)
        beside.replace(target)
    return target


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")


def main() -> None:
    """Builds unless the library is there and up to date."""
    stamp = f"{source_digest()}".encode()
    if LIBRARY.exists() and stamp in LIBRARY.read_bytes():
        return
    try:
        build()
    except BuildError as error:
        sys.exit(f"the native kernels were not built: {error}")


if __name__ == "__main__":
    main()
