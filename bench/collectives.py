"""What devices exchange in a compiled step, read from the text of its HLO: the one reader that tests, the compile gate
and `bench/sharding.py` share.

Knows XLA's text of collectives and of what encloses them: a loop's body counts as often as the loop turns. Compiles
nothing.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharding.mesh import AXES, MeshShape

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, **{f"{kind}{bits}": bits for kind in "suf" for bits in (4, 8, 16, 32, 64)}}
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)|branch_computations=\{(.*?)\}"
)


@dataclass(frozen=True, slots=True)
class Piece:
    """An array as HLO writes it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes, of types narrower than a byte too."""
        bits = next((bits for name, bits in _BITS.items() if self.dtype == name), 8)  # f8e4m3fn and the like
        return math.prod(self.shape) * bits // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One instruction by which devices exchange something.

    Attributes:
        kind: of `KINDS`.
        axes: of the mesh, along which devices take part.
        devices: that take part in one exchange.
        pieces: what a device has afterwards: one array, or several that XLA sends together.
        times: that it runs in a step, or in one turn of a loop whose number of turns is not known.
        always: False where a condition or such a loop decides whether it runs: what only some requests ask for.
        asynchronous: XLA lets other work run between its start and its end.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    pieces: tuple[Piece, ...]
    times: int = 1
    always: bool = True
    asynchronous: bool = False

    def moved(self, piece: Piece) -> int:
        """Bytes of one array that a device sends each time, and receives as many, where no device sends more than it
        must: in rings (Patarasuk and Yuan, doi:10.1016/j.jpdc.2008.09.002)."""
        others = self.devices - 1
        share = {
            "all-reduce": 2 * others / self.devices,
            "all-gather": others / self.devices,
            "reduce-scatter": float(others),
            "all-to-all": others / self.devices,
            "collective-permute": 1.0,
        }
        return round(piece.nbytes * share[self.kind])

    @property
    def step_bytes(self) -> int:
        """Bytes that a device sends in a step."""
        return self.times * sum(self.moved(piece) for piece in self.pieces)


def collectives(hlo: str, mesh: MeshShape) -> list[Collective]:
    """Everything that a step's devices exchange.

    Args:
        hlo: text of a compiled program.
        mesh: that it was compiled for; devices are counted as in `MeshShape.build`'s result.

    Raises:
        ValueError: devices exchange something along no axes of the mesh.
    """
    computations, entry = _computations(hlo)
    found: list[Collective] = []

    def walk(name: str, times: int, always: bool) -> None:
        for line in computations.get(name, ()):
            one = _collective(line, mesh, times, always)
            if one is not None:
                found.append(one)
                continue
            inner, certain = times, always
            if " while(" in line:
                turns = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
                inner, certain = times * int(turns[1] if turns else 1), always and turns is not None
            elif " conditional(" in line:
                certain = False
            for single, several in _CALLED.findall(line):
                for called in [single] if single else [part.strip().lstrip("%") for part in several.split(",")]:
                    walk(called, inner, certain)

    walk(entry, 1, True)
    return found


def listed(found: Sequence[Collective]) -> list[str]:
    """A list to commit and compare: a line for each array, however XLA sends arrays together."""
    times: Counter[tuple[str, tuple[str, ...], Piece, bool]] = Counter()
    moved: dict[tuple[str, tuple[str, ...], Piece, bool], int] = {}
    for one in found:
        for piece in one.pieces:
            key = one.kind, one.axes, piece, one.always
            times[key] += one.times
            moved[key] = one.moved(piece)
    return sorted(
        f"{kind} over {'+'.join(axes)}: {piece}, {_times(count)}{'' if always else ' where asked for'}, "
        f"{count * moved[kind, axes, piece, always]} bytes"
        for (kind, axes, piece, always), count in times.items()
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def differences(found: Sequence[str], expected: Sequence[str]) -> list[str]:
    """What a program exchanges beside its list, and what of the list it does not."""
    return [
        *(f"exchanges what is not listed: {line}" for line in found if line not in expected),
        *(f"does not exchange what is listed: {line}" for line in expected if line not in found),
    ]


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation by its name, and the name of the one that the program begins with."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if head and not line.startswith(" "):
            lines = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return found, entry


def _collective(line: str, mesh: MeshShape, times: int, always: bool) -> Collective | None:
    match = re.match(rf"\s+(?:ROOT )?%?\S+ = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
    if match is None:
        return None
    written, kind, start = match.groups()
    pieces = tuple(_results(written, both=bool(start) and kind != "all-reduce"))
    axes, devices = _group(line, mesh)
    if kind == "all-to-all" and len(pieces) == devices > 1:  # a part for each device, as arrays of their own
        first = pieces[0]
        pieces = (Piece(first.dtype, (devices * first.shape[0], *first.shape[1:])),)
    waits = start is None or '"is_sync":true' in line
    return Collective(
        kind=kind, axes=axes, devices=devices, pieces=pieces, times=times, always=always, asynchronous=not waits
    )


def _results(written: str, *, both: bool) -> Iterator[Piece]:
    """The arrays of a type; of what starts an exchange it names operands first, then results."""
    if both:
        written = _members(re.sub(r"/\*.*?\*/|\{.*?\}", "", written))[1]
    for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", written):
        yield Piece(dtype, tuple(int(size) for size in shape.split(",") if size))


def _members(written: str) -> list[str]:
    """Of a tuple type, each of which may be one."""
    found, depth = [""], 0
    for letter in written[1:-1]:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return found


def _group(line: str, mesh: MeshShape) -> tuple[tuple[str, ...], int]:
    """Axes along which devices exchange something, and how many of them do, from whichever form XLA writes."""
    if axes := re.search(r"replica_groups=mesh\[.*?\] \{(.*?)\}", line):
        names = re.findall(r"'(\w+)'", axes[1])
        crossed = tuple(axis for axis in AXES if axis in names and mesh.sizes[axis] > 1)
    else:
        crossed = _crossed(_groups(line, mesh.num_devices), mesh, line)
    return crossed, math.prod(mesh.sizes[axis] for axis in crossed)


def _groups(line: str, num_devices: int) -> np.ndarray[Any, Any]:
    """Devices of each group, a row each."""
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, sizes, order = (tuple(map(int, text.split(","))) if text else None for text in iota.groups())
        assert sizes is not None
        assert shape is not None
        return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(shape)
    lists = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})?\}", line)
    if lists is None:
        raise ValueError(f"no groups of devices in {line.strip()}")
    rows = [list(map(int, row.split(","))) for row in re.findall(r"\{([\d,]+)\}", lists[1] or "")]
    return np.asarray(rows or [list(range(num_devices))])


def _crossed(groups: np.ndarray[Any, Any], mesh: MeshShape, line: str) -> tuple[str, ...]:
    sizes = tuple(mesh.sizes.values())
    places = np.stack(np.unravel_index(groups, sizes))  # [axes, groups, devices]
    varies = (places != places[:, :, :1]).any(axis=(1, 2))
    crossed = tuple(axis for axis, differs in zip(AXES, varies, strict=True) if differs)
    if "source_target_pairs" not in line and math.prod(mesh.sizes[axis] for axis in crossed) != groups.shape[1]:
        raise ValueError(f"devices exchange something along no axes of {mesh.text}: {line.strip()[:300]}")
    return crossed
