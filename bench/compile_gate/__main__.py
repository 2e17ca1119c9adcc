"""`python -m bench.compile_gate [--all] [--only REGEX] [--target h200] [--steps] [--meshes] [--write]`: compiles
kernels and steps, compares, reports.

Ends with 1 where a kernel spills, does not fit, or takes more than the committed table says.
"""

import itertools
import re
import sys
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, get_args

import typer

from bench.compile_gate import aot, table  # first: sets XLA's flags
from bench.compile_gate.cases import KernelCase, Target
from bench.compile_gate.resources import kernel_resources


def main(
    every: Annotated[bool, typer.Option("--all", help="Every case on every GPU; default: some, on an H200.")] = False,
    only: Annotated[str | None, typer.Option(help="Cases whose names this regular expression finds.")] = None,
    target: Annotated[str | None, typer.Option(help="h200, a100 or b200.")] = None,
    write: Annotated[bool, typer.Option(help="Keep what is found in docs/kernels.json and docs/kernels.md.")] = False,
    steps: Annotated[bool, typer.Option(help="Check whole steps of Llama-3.1-8B instead; --all does both.")] = False,
    meshes: Annotated[
        bool, typer.Option(help="Those over four and eight GPUs instead; by default two of them.")
    ] = False,
) -> None:
    """Compile kernels for GPUs that are not here."""
    import jax

    if target is not None and target not in get_args(Target):
        raise typer.BadParameter(f"must be one of {', '.join(get_args(Target))}, got {target!r}")
    known = table.read()
    wrong: list[str] = []
    for case, gpu in [] if (steps or meshes) and not every else _chosen(every, only, target):
        try:
            row = measure(case, gpu)
        except Exception as error:  # the others are still worth knowing
            wrong.append(f"{case.name} on {gpu}: {type(error).__name__}: {str(error)[:400]}")
            print(f"{case.name:<44} {gpu}  FAILED", flush=True)
            continue
        print(f"{case.name:<44} {gpu}  {_line(row)}", flush=True)
        if write:
            table.write(jax.__version__, {case.name: {gpu: row}})
        if row["spill_bytes"] or not write:
            wrong += table.problems(case.name, gpu, row, known, same_jax=known["jax"] == jax.__version__)
    is_default = not (steps or meshes or every) and only is None and target in (None, "h200")
    if steps or is_default or (every and only is None):
        wrong += _steps(steps or every)
    if meshes or (not steps and only is None and target in (None, "h200")):
        wrong += _meshes(every or meshes, write=write)
    for problem in wrong:
        print(problem, file=sys.stderr)
    raise typer.Exit(1 if wrong else 0)


def all_cases() -> list[KernelCase]:
    """Of all kernels."""
    from bench.compile_gate import activations, attention, matmul

    return [*matmul.CASES, *activations.CASES, *attention.CASES]


def measure(case: KernelCase, target: Target) -> dict[str, Any]:
    """Compiles one case; of several kernels, each number is the largest."""
    aot.compiled(partial(case.function, device=aot.NAMES[target]), case.arguments, target)
    kernels = kernel_resources(aot.DUMP, case.kernel)
    operations = max(kernel.loop_operations for kernel in kernels)
    loops = any(kernel.tensor_core for kernel in kernels)  # some products take a single turn, and have no loop
    return {
        "registers": max(kernel.registers for kernel in kernels),
        "spill_bytes": max(kernel.spill_bytes for kernel in kernels),
        "shared_memory": max(kernel.shared_memory for kernel in kernels),
        "threads": max(kernel.threads for kernel in kernels),
        "tensor_core": max(kernel.tensor_core for kernel in kernels),
        "operations_a_weight": round(operations / case.weights, 3) if case.weights and loops else None,
    }


def _steps(every: bool) -> list[str]:
    """What is wrong with whole steps, compiled for an H200."""
    from bench.compile_gate.steps import PROGRAMS, QUICK, TYPES, check_step

    wrong: list[str] = []
    for type_name, program in itertools.product(TYPES, PROGRAMS) if every else (QUICK,):
        launches, found = check_step(type_name, program, "h200")
        print(f"Llama-3.1-8B, {type_name}, {program}: {launches} launches a layer, {len(found)} problems", flush=True)
        wrong += found
    return wrong


def _meshes(every: bool, *, write: bool) -> list[str]:
    """What is wrong with steps over several H200s."""
    from bench.compile_gate.meshes import CASES, QUICK, check

    wrong: list[str] = []
    for case in CASES if every else QUICK:
        found = check(case, "h200", write=write)
        print(f"Llama-3.1-8B, {', '.join(map(str, case))}: {len(found)} problems", flush=True)
        wrong += found
    return wrong


def _chosen(every: bool, only: str | None, target: str | None) -> Iterator[tuple[KernelCase, Target]]:
    for case in all_cases():
        if only is not None and not re.search(only, case.name):
            continue
        if only is None and not every and not case.quick:
            continue
        targets = case.targets if every or target is not None else case.targets[:1]
        for one in targets:
            if target is None or one == target:
                yield case, one


def _line(row: dict[str, Any]) -> str:
    ops = "" if row["operations_a_weight"] is None else f", {row['operations_a_weight']:.2f} operations a weight"
    return (
        f"{row['registers']} registers, {row['spill_bytes']} spilled, {row['shared_memory']} shared, "
        f"{row['tensor_core']} matrix operations{ops}"
    )


if __name__ == "__main__":
    typer.run(main)
