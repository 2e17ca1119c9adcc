"""Where the bits of codes lie in the tiles layout: what `native/src/codes.h` says, for what numpy packs and unpacks."""

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

STEPS = 8  # of a block: four inputs each


class TileField(NamedTuple):
    """Bits of the codes of one step, and where they lie."""

    step: int
    shift: int  # in a code
    width: int
    word: int  # of a block, which has as many as a code has bits
    bit: int  # in a byte of it


@lru_cache
def tile_fields(bits: int) -> tuple[TileField, ...]:
    """All fields of a block of codes of 2, 3, 4, 5, 6 or 8 bits."""
    if bits in _SPREAD:
        return tuple(TileField(*numbers) for numbers in _SPREAD[bits])
    return tuple(TileField(step, 0, bits, step % bits, step // bits * bits) for step in range(STEPS))


_SPREAD: Mapping[int, tuple[tuple[int, int, int, int, int], ...]] = MappingProxyType(
    {
        6: (
            *((step, 0, 6, step, 0) for step in range(6)),
            *((6, 2 * word, 2, word, 6) for word in range(3)),
            *((7, 2 * word, 2, 3 + word, 6) for word in range(3)),
        ),
        5: (
            *((step, 0, 5, step, 0) for step in range(5)),
            *((5, 0, 3, 0, 5), (5, 3, 2, 3, 6)),
            *((6, 0, 3, 1, 5), (6, 3, 2, 4, 6)),
            *((7, 0, 3, 2, 5), (7, 3, 1, 3, 5), (7, 4, 1, 4, 5)),
        ),
        3: (
            *((step, 0, 3, step // 2, step % 2 * 3) for step in range(6)),
            *((6, 0, 2, 0, 6), (6, 2, 1, 2, 6)),
            *((7, 0, 2, 1, 6), (7, 2, 1, 2, 7)),
        ),
    }
)
