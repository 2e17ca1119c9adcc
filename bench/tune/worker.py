"""A process of the tuner: tunes one shape after the other. It has the GPU only while it holds the lock."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock

from bench.tune.search import Candidates
from bench.tune.subjects import Subject, subjects


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What was found for one kernel and shape; `times` are the fastest first: seconds, tiles, default."""

    device: str
    operation: str
    key: str
    name: str
    times: list[dict[str, Any]]
    problem: str | None = None


_state: dict[str, Any] = {}


def begin(lock: Path, small: bool) -> None:
    """Makes this process a worker."""
    _state.update(lock=FileLock(lock), subjects=subjects(small=small))


def names(*, small: bool) -> list[str]:
    """Of all that can be tuned."""
    return [f"{one.operation}: {one.name}" for one in subjects(small=small)]


def tune(index: int, *, deadline: float, rounds: int) -> Tuned:
    """Tunes one of `names`."""
    subject: Subject = _state["subjects"][index]
    what = {"operation": subject.operation, "key": subject.key, "name": subject.name}
    device = jax.devices()[0].device_kind
    try:
        times = Candidates(subject, lock=_state["lock"]).fastest(deadline=deadline, rounds=rounds)
    except Exception as error:  # of one shape: the others go on
        return Tuned(device=device, **what, times=[], problem=f"{type(error).__name__}: {str(error)[:300]}")
    rows = [
        {"seconds": seconds, "default": tiles == subject.default(device), "tiles": dataclasses.asdict(tiles)}
        for tiles, seconds in times.items()
    ]
    return Tuned(device=device, **what, times=rows)
