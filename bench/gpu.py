"""`python -m bench.gpu`: everything that is worth measuring on a machine with an NVIDIA GPU, in one command.

Sections (`gpu_sections/`) run one after the other, each in a process of its own that may fail without harm to the
others. No network, no model files: weights are random, at real shapes. Results go to `bench/results/gpu.json`, which a
later run with `--only` completes, and beside it as a Markdown table. `--small` runs tiny shapes anywhere.

A section ends when its share of the time is over; what it leaves is the next ones'. Programs are kept beside the
results, so that a section which is run again does not compile again.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.gpu_sections import SECTIONS, SHARES, report
from bench.gpu_sections.protocol import Section

RESULTS = Path(__file__).parent / "results"
BUDGET_S = 530.0  # of all sections together: a machine may be lent for nine minutes
SMALL_S = 3600.0
SHOWN = 4000  # characters of what a section said at its end, where it failed


def main(
    only: Annotated[list[str] | None, typer.Option(help="A section; may be repeated. Default: all.")] = None,
    small: Annotated[bool, typer.Option(help="Tiny shapes, interpreted kernels: for a machine without a GPU.")] = False,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Of all sections; default: 530, or 3600 if small.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The JSON file; default: bench/results/gpu.json.")] = None,
    section: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, and write what was found after every section."""
    unknown = [name for name in only or [] if name not in SECTIONS]
    if unknown:
        raise typer.BadParameter(f"only: {unknown[0]!r} is no section; there are {', '.join(SECTIONS)}")
    path = out or RESULTS / ("gpu-small.local.json" if small else "gpu.json")
    if section is not None:
        _run(section, path, small=small)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for name, due in due_times(only or list(SECTIONS), seconds or (SMALL_S if small else BUDGET_S)):
        print(f"== {name}", flush=True)
        problem = _in_a_process(name, path, small=small, seconds=max(due - (time.monotonic() - began), 5.0))
        found = report.read(path)
        found["small"] = small
        found["sections"].setdefault(name, {"measurements": []})["problem"] = problem
        _write(path, found)
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


def due_times(names: Sequence[str], seconds: float) -> Iterator[tuple[str, float]]:
    """By when each section has to end, in seconds from the start: what one leaves is the next ones'."""
    whole, ends = sum(SHARES[name] for name in names), 0.0
    for name in names:
        ends += seconds * SHARES[name] / whole
        yield name, ends


def _in_a_process(name: str, path: Path, *, small: bool, seconds: float) -> str | None:
    """Runs a section; what went wrong, if anything did."""
    command = [
        sys.executable,
        "-m",
        "bench.gpu",
        "--section",
        name,
        "--out",
        str(path),
        *(["--small"] if small else []),
    ]
    environment = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "JAX_COMPILATION_CACHE_DIR": str(path.parent / "xla.local.cache"),
        **os.environ,
    }
    environment |= {"JAX_PLATFORMS": "cpu"} if small else {}
    try:
        done = subprocess.run(command, timeout=seconds, env=environment, check=False, stderr=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        return f"took longer than the {seconds:.0f} s that it had; --only {name} measures it alone"
    if done.returncode == 0:
        return None
    print(done.stderr[-SHOWN:], file=sys.stderr)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return f"exit code {done.returncode}: {lines[-1][:300] if lines else 'without a word'}"


def _run(name: str, path: Path, *, small: bool) -> None:
    """The section itself, in the process made for it: keeps every measurement as it comes."""
    module: Any = importlib.import_module(SECTIONS[name])
    measured: Section = module
    found = report.read(path)
    context = report.context_of(found, small=small)
    rows: list[dict[str, Any]] = []
    found["sections"][name] = {"measurements": rows}
    found["machine"] = _machine()
    _write(path, found)  # also where nothing gets measured: what an older run found is gone
    for measurement in measured.measure(context):
        rows.append(report.as_row(measurement, context))
        print(f"{measurement.name:<56}{1e6 * measurement.seconds:12,.1f} µs", flush=True)
        _write(path, found)


def _machine() -> dict[str, Any]:
    import jax

    device = jax.devices()[0]
    return {"device": device.device_kind, "jax": jax.__version__, "python": sys.version.split()[0]}


def _write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(report.markdown(found), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
