"""Finds the compiled kernels, refuses those that do not fit, and makes them known to JAX: once a process.

Owns the checks and the knobs of the library as a whole (variant, threads). Calls of kernels are in their own modules.
"""

import ctypes
import logging
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeAlias

import jax
import numpy as np

from atoma_jax.cores import usable_cores
from atoma_jax.native.build import LIBRARY, BuildError, Stamp, ffi_version, source_digest, takes

VARIANTS: Final = ("portable", "avx2", "avx512-vnni", "avx512-bf16")  # as in src/variant.h
# Names that handlers are registered under; the library exports each.
HANDLERS: Final = tuple(
    f"atoma_{name}"
    for name in (
        "attention",
        "dense",
        "draw",
        "gated",
        "matmul",
        "net",
        "probe",
        "rms_norm",
        "rotate_heads",
        "rows",
        "survey",
    )
)

REBUILD = "run `python -m atoma_jax.native.build`, which takes a C++ compiler and some seconds"

_log = logging.getLogger(__name__)

_Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class UnfitError(Exception):
    """The library cannot be used here; the message says why, and what to do."""


class Library:
    """The kernels, loaded and registered."""

    def __init__(self, loaded: ctypes.CDLL):
        self._loaded = loaded
        size, place = ctypes.c_int64, ctypes.c_void_p
        loaded.atoma_pack_codes.argtypes = (place, size, size, size, place, size, place)
        loaded.atoma_pack_factors.argtypes = (place, size, size, size, place, size, place)

    @property
    def variant(self) -> str:
        """What kernels run with."""
        return VARIANTS[self._loaded.atoma_active_variant()]

    @property
    def converts_halves(self) -> bool:
        """Whether kernels convert float16 by an instruction. C++ alone takes three times as long for all of attention
        as with a float32 cache."""
        return self.variant != "portable"

    def supported_variants(self) -> tuple[str, ...]:
        """Those that this CPU can run."""
        return tuple(name for index, name in enumerate(VARIANTS) if self._loaded.atoma_is_supported(index))

    def pack_codes(self, codes: _Array, bits: int, rows: _Array, out: _Array) -> None:
        """`tiles.put_codes` of arrays that were checked there; lets other threads run meanwhile."""
        assert all(array.flags.c_contiguous for array in (codes, rows, out))
        n, K = codes.shape
        places = [array.ctypes.data for array in (codes, rows, out)]
        self._loaded.atoma_pack_codes(places[0], n, K, bits, places[1], out.shape[1], places[2])

    def pack_factors(self, factors: _Array, rows: _Array, out: _Array) -> None:
        """`tiles.put_factors` likewise; both arrays have one type."""
        assert all(array.flags.c_contiguous for array in (factors, rows, out))
        assert factors.dtype == out.dtype, (factors.dtype, out.dtype)
        n, groups = factors.shape
        places = [array.ctypes.data for array in (factors, rows, out)]
        self._loaded.atoma_pack_factors(places[0], n, groups, out.itemsize, places[1], out.shape[1], places[2])

    @contextmanager
    def forced(self, *, variant: str | None = None, threads: int | None = None) -> Generator[None]:
        """Runs kernels otherwise than this machine would choose; for tests. No kernel may run at either end.

        Args:
            variant: one of `supported_variants()`.
            threads: of the pool, the calling one included.
        """
        assert variant is None or variant in self.supported_variants(), variant
        before = self._loaded.atoma_active_variant()
        if variant is not None:
            self._loaded.atoma_force_variant(VARIANTS.index(variant))
        if threads is not None:
            self._loaded.atoma_set_threads(threads)
        try:
            yield
        finally:
            self._loaded.atoma_force_variant(before)
            self._loaded.atoma_set_threads(usable_cores())


@lru_cache(maxsize=1)
def library() -> Library | None:
    """The kernels; None where there are none that fit. The log says why, once."""
    try:
        return load(LIBRARY)
    except UnfitError as reason:
        _log.warning("native kernels are off, and XLA computes instead, more slowly: %s", reason)
        return None


def load(path: Path) -> Library:
    """Loads a library after it has been checked, and registers its handlers.

    Raises:
        UnfitError: it is not there, is not made of these sources, or needs another jaxlib.
    """
    if not path.exists():
        raise UnfitError(f"{path} is missing: it was not built for lack of a C++ compiler; install one, and {REBUILD}")
    stamp = Stamp.of(path)
    if stamp is None or stamp.sources != source_digest():
        raise UnfitError(f"{path} was not built from the sources beside it: {REBUILD}")
    try:
        running = ffi_version(Path(jax.ffi.include_dir()))
    except BuildError as error:
        raise UnfitError(str(error)) from error
    if not takes(running, stamp.ffi):
        ours, theirs = (".".join(map(str, version)) for version in (stamp.ffi, running))
        raise UnfitError(f"{path} was built for version {ours} of XLA's FFI, and this jaxlib has {theirs}: {REBUILD}")
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnfitError(f"{path} does not load on this machine ({error}): {REBUILD}") from error
    loaded.atoma_set_threads(usable_cores())
    for name in HANDLERS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return Library(loaded)
