"""`python -m bench.tune`: measures tiles on the GPU of this machine and writes `pallas_kernels/tuned/DEVICE.json`.

`pallas_kernels/tuning.py` reads it; nothing is tuned while serving. The compile gate compiles what was found.

Tracing and compiling take most of the time, so several processes do that, each for another shape; a lock lets one of
them have the GPU. One that crashes, as compilers do at odd sizes, costs its shape and no other.
"""

import dataclasses
import json
import multiprocessing
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.tune.worker import Tuned, begin, names, tune
from pallas_kernels.tuning import tuned_file

TUNED = Path(__file__).parents[2] / "pallas_kernels" / "tuned"
GAIN = 1.02  # over the default tiles, from which on tiles are kept


def main(
    only: Annotated[str, typer.Option(help="A regular expression: of the kernels' names and shapes.")] = "",
    seconds: Annotated[float, typer.Option(min=1, help="No shape is begun after so many.")] = 3600,
    processes: Annotated[int, typer.Option(min=1, help="That compile at once.")] = max(1, (os.cpu_count() or 1) // 2),
    rounds: Annotated[int, typer.Option(min=1, help="How often neighbours of the best tiles are tried.")] = 3,
    folder: Annotated[
        Path | None, typer.Option(help="Where the device's file goes; default: what serving reads.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="Every time that was measured, as JSON lines.")] = None,
    small: Annotated[
        bool, typer.Option(help="One tiny product, interpreted: shows that it runs; kept only in a given folder.")
    ] = False,
) -> None:
    """Find the fastest tiles of every kernel and shape, and keep those that beat the default ones."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    deadline = time.monotonic() + seconds
    kept_in = folder or (None if small else TUNED)
    wanted = _wanted(only, small=small)
    writing = threading.Lock()
    with tempfile.TemporaryDirectory() as scratch:
        lock = Path(scratch) / "gpu.lock"

        def lane() -> None:
            for tuned in _tuned(wanted, lock, small=small, deadline=deadline, rounds=rounds):
                with writing:
                    _report(tuned)
                    if kept_in is not None:
                        _keep(tuned, kept_in)
                    if log is not None:
                        with log.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(dataclasses.asdict(tuned)) + "\n")

        with ThreadPoolExecutor(processes) as lanes:
            for done in [lanes.submit(lane) for _ in range(min(processes, wanted.qsize()))]:
                done.result()


def _wanted(only: str, *, small: bool) -> queue.SimpleQueue[int]:
    """Places in `names` of what is to be tuned."""
    try:
        chosen = [index for index, name in enumerate(names(small=small)) if re.search(only, name)]
    except re.error as error:
        raise typer.BadParameter(f"only: {only!r} is no regular expression: {error}") from None
    if not chosen:
        some = ", ".join(names(small=small)[:3])
        raise typer.BadParameter(f"only: {only!r} finds none of what is tuned; there are {some} and others")
    wanted = queue.SimpleQueue[int]()
    for index in chosen:
        wanted.put(index)
    return wanted


def _tuned(wanted: queue.SimpleQueue[int], lock: Path, *, small: bool, deadline: float, rounds: int) -> Iterator[Tuned]:
    """What one process finds, or those that follow it."""
    context = multiprocessing.get_context("spawn")
    process: ProcessPoolExecutor | None = None
    try:
        while time.monotonic() < deadline:
            try:
                index = wanted.get_nowait()
            except queue.Empty:
                return
            process = process or ProcessPoolExecutor(1, context, begin, (lock, small))
            try:
                yield process.submit(tune, index, deadline=deadline, rounds=rounds).result()
            except BrokenProcessPool:
                print(f"{names(small=small)[index]}: the process crashed", flush=True)
                process = None
    finally:
        if process is not None:
            process.shutdown()


def _report(tuned: Tuned) -> None:
    if not tuned.times:
        print(f"{tuned.name}: {tuned.problem or 'nothing compiled'}", flush=True)
        return
    best = tuned.times[0]
    default = next((one["seconds"] for one in tuned.times if one["default"]), float("nan"))
    tiles = ", ".join(f"{name} {size}" for name, size in best["tiles"].items())
    print(f"{tuned.name}: {1e6 * default:.1f} → {1e6 * best['seconds']:.1f} µs, {tiles}", flush=True)


def _keep(tuned: Tuned, folder: Path) -> None:
    path = folder / tuned_file(tuned.device)
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not tuned.times:
        return
    best = tuned.times[0]
    default = next((one["seconds"] for one in tuned.times if one["default"]), float("inf"))
    kept = found.setdefault(tuned.operation, {})
    kept.pop(tuned.key, None)
    if default > GAIN * best["seconds"]:
        kept[tuned.key] = best["tiles"]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
