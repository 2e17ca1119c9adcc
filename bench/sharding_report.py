"""How the results of `bench/sharding.py` look: a page in Markdown and a plot. Measures and compiles nothing."""

# The library that draws is not in every environment.
# pyright: reportMissingImports=false

import bisect
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from atoma_jax.engine.buckets import Program
from atoma_jax.engine.cutting import device_spec, served_spec
from atoma_jax.ops.residual import is_cut
from atoma_jax.ops.ring import goes_round
from bench.compile_gate import table
from bench.sharding_steps import MODELS, PROGRAMS
from bench.step_model import (
    Exchange,
    Machine,
    StepTime,
    decode_load,
    exchange_at,
    prefill_load,
    step_time,
)
from sharding.mesh import MeshShape, parse_mesh

ROWS, TOKENS, CONTEXT = (1, 8, 64, 256), (512, 2048, 8192, 32768), 1024
KV_SEQUENCES = 64
MOST_TOKENS = 1 << 17  # of one step, in the search for the size at which a mesh becomes the faster one

_INTRODUCTION = """
# What a mesh costs, and what it saves

Made by `python -m bench.sharding`; do not edit. All numbers are in [sharding.json](sharding.json).

No GPU has run any of this. Bytes and exchanges are read from steps that XLA compiled for eight simulated devices, from
shapes alone, weights and cache in bfloat16; times of H200s are computed from them, with {nvlink:.0f} GB/s of NVLink a
GPU (both directions together), {hbm:.0f} GB/s of memory, {matrix:.0f} TFLOP/s and {latency:.0f} µs for each exchange
besides its bytes. The four are options, no measurements. Every rate is taken for reached and nothing else for taking
time: the times compare meshes, they promise nothing.

Rows and tokens are those of all slices together; a slice (of `data` × `fsdp`) gets its share, at least one row.
"""

_BYTES = """
## Bytes of a device

Weights; KV of {sequences} sequences of {context} tokens; temporaries of a step of eight rows of decode and of those
with 512 to 32768 tokens of prefill in each slice, as simulated devices need them, which attend in another way than GPUs
do. Under `fsdp` two whole layers are among them.
"""

_EXCHANGES = """
## What a device sends in a step of decode

{model}, eight rows in each slice: everything that XLA put into the step, in bytes that a device sends, and it receives
as many. What is only there where a request asks for it (sampling, logprobs) is in the JSON file. "ahead" is sent while
the layer before computes.
"""

_TIMES = """
## Modelled times of a step

Milliseconds on H200s, of decode at {context} tokens of context and of prefill in prompts of as many.
"""

_CROSSOVER = """
## Where `fsdp` and `tensor` cross over

Both spread weights and cache alike. `tensor` sends activations, which grow with the tokens of a step, and hides them
behind products where tokens go round; `fsdp` sends weights, whatever the step holds, and hides them behind a layer that
computes long enough. So `tensor` is for decode, and `fsdp` for steps of many tokens over so many devices that products
hide activations no longer:
"""

_SIMULATED = """
## On simulated devices

A decode step of a small model (17 million parameters in layers, float32, {rows} rows in all) on devices that share the
cores of one machine: more devices are more threads and more copies, not more speed. Least of {steps} steps.
"""


def markdown(results: Mapping[str, Any]) -> str:
    """The page."""
    inputs = results["inputs"]
    shown = {
        "nvlink": inputs["nvlink"] / 1e9, "hbm": inputs["hbm"] / 1e9, "matrix": inputs["matrix"] / 1e12,
        "latency": inputs["latency"] * 1e6,
    }  # fmt: skip
    machine, lines = Machine(**inputs), [_INTRODUCTION.format(**shown).strip()]
    models: Mapping[str, Any] = results["models"]
    lines += ["", "![Modelled time of a step over its tokens, by mesh](sharding.png)"]
    first = next(iter(models))
    lines += ["", _BYTES.format(sequences=KV_SEQUENCES, context=CONTEXT).strip()]
    for name, meshes in models.items():
        lines += ["", f"{name}:", "", *_byte_table(meshes)]
    lines += _gate_table()
    lines += ["", _EXCHANGES.format(model=first).strip(), "", *_exchange_table(models[first])]
    lines += ["", _TIMES.format(context=CONTEXT).strip()]
    for name, meshes in models.items():
        lines += ["", f"{name}:", "", *_time_table(name, meshes, machine)]
    lines += ["", _CROSSOVER.strip(), "", *_crossovers(models, machine)]
    if "steps" in results:
        lines += _simulated(results["steps"])
    computer = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in computer["versions"].items())
    lines += ["", f"{computer['cpu_cores']} cores of {computer['cpu']}; {versions}; {computer['date'][:10]}."]
    return "\n".join(lines) + "\n"


def _simulated(steps: Mapping[str, Any]) -> list[str]:
    seconds: Mapping[str, float] = steps["seconds"]
    rows = ((mesh_name(mesh), f"{1e3 * time:.1f}", f"{time / seconds['data=1']:.2f}") for mesh, time in seconds.items())
    text = _SIMULATED.format(rows=steps["rows"], steps=steps["steps"]).strip()
    return ["", text, "", *_table(("mesh", "ms", "× one device"), rows)]


def mesh_name(mesh: str) -> str:
    """For people."""
    return "one device" if mesh == "data=1" else mesh


def modelled(name: str, mesh: str, programs: Mapping[str, Any], machine: Machine, kind: str, tokens: int) -> StepTime:
    """Time of a step of `tokens` tokens in all slices together.

    Args:
        name: of the model.
        mesh: that it is cut over.
        programs: what was compiled for it.
        machine: a GPU and its links.
        kind: decode or mixed: prefill.
        tokens: of decode as many rows.
    """
    shape = parse_mesh(mesh)
    own = max(1, -(-tokens // shape.num_slices))
    load = decode_load(own, CONTEXT) if kind == "decode" else prefill_load(own, CONTEXT)
    few, *_, many = alike(own, name, shape)
    steps = Exchange(**programs[str(few)]["exchange"]), Exchange(**programs[str(many)]["exchange"])
    exchange = exchange_at(steps, (few.tokens, many.tokens), few.rows, load)
    part, vocab_size = _part(name, shape)
    return step_time(part, shape, vocab_size, load, exchange, machine)


def alike(tokens: int, name: str, mesh: MeshShape) -> list[Program]:
    """The compiled steps of a slice that exchange what one of so many tokens does, in other sizes."""
    width = MODELS[name].dim

    def way(tokens: int) -> tuple[bool, bool]:
        return is_cut(tokens, mesh), is_cut(tokens, mesh) and goes_round(tokens, width, mesh, "tensor")

    return [program for program in PROGRAMS if way(program.tokens) == way(tokens)]


@cache
def _part(name: str, mesh: MeshShape) -> tuple[Any, int]:
    spec = MODELS[name]
    served = served_spec(spec, mesh)
    return device_spec(served, mesh, spec.vocab_size), served.vocab_size


def _byte_table(meshes: Mapping[str, Any]) -> list[str]:
    def cells(mesh: str, row: Mapping[str, Any]) -> list[str]:
        tokens = KV_SEQUENCES * CONTEXT / parse_mesh(mesh).num_slices
        kv = row["kv_bytes_per_token"] * tokens
        programs = [row["programs"][str(program)] for program in PROGRAMS]
        temporaries = [f"{program['temporary_bytes'] / 1e6:,.0f} MB" for program in programs]
        return [mesh_name(mesh), _gb(row["weight_bytes"]), _gb(kv), *temporaries]

    head = ("mesh", "weights", "KV", *(f"temporaries, {program}" for program in PROGRAMS))
    return _table(head, (cells(mesh, row) for mesh, row in meshes.items()))


def _gate_table() -> list[str]:
    """What the compile gate found for real GPUs."""
    cases: Mapping[str, Any] = table.read_steps()["cases"]
    rows = (
        (
            name,
            _gb(row["argument_bytes"]),
            f"{row['temporary_bytes'] / 1e6:,.0f} MB",
            f"{sum(int(line.split(', ')[-1].split()[0]) for line in row['collectives']) / 1e6:,.1f} MB",
        )
        for name, row in cases.items()
    )
    return [
        "",
        "Llama-3.1-8B compiled in full for H200s, with Pallas kernels (`python -m bench.compile_gate --meshes`); "
        "arguments are weights, a cache of 512 pages and the sampler's state:",
        "",
        *_table(("mesh, weights, step of a slice", "arguments", "temporaries", "sent in a step"), rows),
    ]


def _exchange_table(meshes: Mapping[str, Any]) -> list[str]:
    rows: list[Sequence[str]] = []
    for mesh, row in meshes.items():
        for line in row["programs"][str(PROGRAMS[0])]["collectives"]:
            if "where asked for" in line:
                continue
            what, times, sent = line.rsplit(", ", 2)
            kind, _, array = what.partition(": ")
            ahead = " ahead" if kind == "all-gather over fsdp" and "times" in times else ""
            rows.append((mesh_name(mesh), f"{kind}{ahead}", array, times, f"{int(sent.split()[0]):,}"))
    return _table(("mesh", "exchange", "array", "times", "bytes sent"), rows)


def _time_table(name: str, meshes: Mapping[str, Any], machine: Machine) -> list[str]:
    def cells(mesh: str, row: Mapping[str, Any]) -> list[str]:
        points = [("decode", rows) for rows in ROWS] + [("mixed", tokens) for tokens in TOKENS]
        times = [modelled(name, mesh, row["programs"], machine, kind, tokens).total for kind, tokens in points]
        return [mesh_name(mesh), *(f"{1e3 * time:.2f}" for time in times)]

    head = ("mesh", *(f"decode {rows}" for rows in ROWS), *(f"prefill {tokens}" for tokens in TOKENS))
    return _table(head, (cells(mesh, row) for mesh, row in meshes.items()))


def crossover(name: str, meshes: Mapping[str, Any], machine: Machine, kind: str, devices: int) -> int | None:
    """Tokens of a step from which on `fsdp` over so many devices is faster than `tensor`; None: in no step."""

    def is_faster(tokens: int) -> bool:
        one, other = (
            modelled(name, mesh, meshes[mesh]["programs"], machine, kind, tokens).total
            for mesh in (f"fsdp={devices}", f"tensor={devices}")
        )
        return one < other

    most = max(ROWS) if kind == "decode" else MOST_TOKENS
    sizes = range(devices, most + 1, devices)  # whole shares of the slices
    found = bisect.bisect_left(sizes, True, key=is_faster)
    return sizes[found] if found < len(sizes) else None


def _crossovers(models: Mapping[str, Any], machine: Machine) -> list[str]:
    def cell(name: str, kind: str, devices: int) -> str:
        found = crossover(name, models[name], machine, kind, devices)
        if found is not None:
            return f"from {found:,} on"
        return f"not up to {max(ROWS) if kind == 'decode' else MOST_TOKENS:,}"

    rows = (
        (name, str(devices), cell(name, "decode", devices), cell(name, "mixed", devices))
        for name in models
        for devices in (2, 4, 8)
        if {f"fsdp={devices}", f"tensor={devices}"} <= models[name].keys()
    )
    return _table(("model", "devices", "`fsdp` is faster: rows of decode", "tokens of prefill"), rows)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_line(head), _line(["---", *["--:"] * (len(head) - 1)]), *(_line(row) for row in rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draws modelled times over the tokens of a step: a row of panels a model, decode and prefill.

    Raises:
        ImportError: matplotlib, of the extra `bench`, is not installed.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    models, machine = results["models"], Machine(**results["inputs"])
    figure, panels = pyplot.subplots(
        len(models), 2, figsize=(13, 4.6 * len(models)), layout="constrained", squeeze=False
    )
    styles = {"tensor": ("C0", "-"), "fsdp": ("C1", "-"), "data": ("C7", "-"), "fsdp,tensor": ("C2", "--")}
    widths = {1: 1.0, 2: 1.0, 4: 1.8, 8: 2.8}
    for (name, meshes), row in zip(models.items(), panels, strict=True):
        for axes, kind, most in zip(row, ("decode", "mixed"), (max(ROWS), 1 << 16), strict=True):
            for mesh, found in meshes.items():
                shape = parse_mesh(mesh)
                sizes = [2**power for power in range(most.bit_length())]
                times = [1e3 * modelled(name, mesh, found["programs"], machine, kind, size).total for size in sizes]
                used = ",".join(axis for axis, size in shape.sizes.items() if size > 1)
                color, line = styles[used] if used else ("black", ":")
                axes.plot(sizes, times, line, color=color, linewidth=widths[shape.num_devices], label=mesh_name(mesh))
            what = "sequences that decode" if kind == "decode" else "tokens of prefill"
            axes.set(xscale="log", yscale="log", title=f"{name}, {what}", xlabel=f"{what} in a step, all slices")
            axes.set_ylabel("ms of a step, modelled")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
