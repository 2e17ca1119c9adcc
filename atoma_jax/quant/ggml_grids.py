"""The grids of ggml's IQ1, IQ2 and IQ3 types: which groups of four or eight magnitudes an index of a file stands for.

A grid is a choice of lattice points that its author fitted to real weights: no rule gives it back, so it has to be
data. `data/ggml_grids.npz` holds all six, one uint16 an entry (9 KB), written by `tests/quant/make_ggml_grids.py` from
the gguf package's tables and checked against them by `tests/quant/test_ggml_grids.py`. The package itself stays a
dependency of tests: every installation would carry it for these numbers alone. ggml's licence, MIT, lies beside the
data. Signs do follow a rule and are computed.

Everything here is made once, when a file first needs it, and is read-only.
"""

from functools import cache
from importlib import resources
from typing import Any, TypeAlias

import numpy as np

_Words: TypeAlias = np.ndarray[Any, np.dtype[np.uint32]] | np.ndarray[Any, np.dtype[np.uint64]]

GRIDS_FILE = "data/ggml_grids.npz"
SIGN = 8  # in a code: set where its number is negative


@cache
def grid(name: str) -> _Words:
    """The codes of every entry of a type's grid, a byte each, the first in the lowest: eight in a u64 or four in a u32.

    Args:
        name: of the type, in small letters.
    """
    file = resources.files("atoma_jax.quant").joinpath(GRIDS_FILE)
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as grids:
        entries = grids[name]
    bits = 4 if name.startswith("iq3") else 2
    codes = (entries[:, None] >> np.arange(0, 16, bits, dtype=np.uint16)) & (2**bits - 1)  # [entries, 4 or 8]
    return _words(codes.astype(np.uint8))


@cache
def signs() -> _Words:
    """For eight sign bits, the first the lowest, eight bytes that are `SIGN` where the bit is set."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return _words(bits * np.uint8(SIGN))


@cache
def even_signs() -> _Words:
    """Likewise for seven sign bits; the eighth makes the number of negative elements even."""
    seven = np.arange(128, dtype=np.uint8)
    odd = np.bitwise_count(seven) & 1
    return _read_only(signs()[seven | (odd << 7)])


@cache
def delta_grid() -> _Words:
    """IQ1's grid twice, the second time with `SIGN` in every code: one look-up by index and sign of the delta."""
    entries = grid("iq1_s")
    return _read_only(np.concatenate([entries, entries | np.uint64(SIGN * 0x0101010101010101)]))


def _words(codes: np.ndarray[Any, np.dtype[np.uint8]]) -> _Words:
    """A row of four or eight bytes as one number."""
    return _read_only(np.ascontiguousarray(codes).view(f"<u{codes.shape[1]}")[:, 0])


def _read_only(words: _Words) -> _Words:
    words.flags.writeable = False  # all threads share them
    return words
