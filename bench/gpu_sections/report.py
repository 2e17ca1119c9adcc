"""The benchmark's JSON and its Markdown table."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from bench.gpu_sections.limits import COPY, PRODUCT
from bench.gpu_sections.protocol import Context, Measurement


def read(path: Path) -> dict[str, Any]:
    """What was measured before; an empty report where there is none."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"machine": {}, "sections": {}}


def context_of(report: dict[str, Any], *, small: bool) -> Context:
    """What sections get, with the limits that were measured."""
    rows = {row["name"]: row for row in report["sections"].get("limits", {}).get("measurements", [])}
    copy, product = rows.get(COPY), rows.get(PRODUCT)
    return Context(
        small=small,
        bandwidth=None if copy is None else copy["moved_bytes"] / copy["seconds"],
        matrix_peak=None if product is None else product["operations"] / product["seconds"],
    )


def as_row(measurement: Measurement, context: Context) -> dict[str, Any]:
    """One measurement as JSON has it."""
    fraction = measurement.fraction(context)
    target, error, allowed = measurement.target, measurement.error, measurement.allowed
    return dataclasses.asdict(measurement) | {
        "fraction": fraction,
        "reached": None if target is None or fraction is None else fraction >= target,
        "correct": None if error is None or allowed is None else error <= allowed,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    lines = ["# GPU benchmark", "", machine or "No device was found."]
    if report.get("small"):
        lines.append("\nSmall shapes with interpreted kernels: this shows that sections run, and no speed.")
    for name, section in report["sections"].items():
        lines += ["", f"## {name}", ""]
        if section.get("problem"):
            lines += [f"Ended early: {section['problem']}", ""]
        if section["measurements"]:
            lines += [
                "| what | µs | tokens/s | fraction of | reached | target | others, µs | error |",
                "|---|---|---|---|---|---|---|---|",
                *(_line(row) for row in section["measurements"]),
            ]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    tokens = f"{row['tokens'] / row['seconds']:,.0f}" if row["tokens"] else ""
    fraction = "" if row["fraction"] is None else f"{row['fraction']:.3f}"
    target = "" if row["target"] is None else f"{row['target']:.2f} {'yes' if row['reached'] else 'NO'}"
    others = ", ".join(f"{name} {1e6 * seconds:,.1f}" for name, seconds in row["others"].items())
    error = "" if row["error"] is None else f"{row['error']:.1e}{'' if row['correct'] else ' WRONG'}"
    cells = [row["name"], f"{1e6 * row['seconds']:,.1f}", tokens, row["fraction_of"], fraction, target, others, error]
    return f"| {' | '.join(cells)} |"
