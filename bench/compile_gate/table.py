"""The table of what kernels take: kept as JSON, shown as Markdown, compared with what was just compiled. Likewise the
list of what steps over meshes take and exchange."""

import json
from pathlib import Path
from typing import Any, TypeAlias

Rows: TypeAlias = dict[str, dict[str, dict[str, Any]]]  # case → target → what was found

_DOCS = Path(__file__).parents[2] / "docs"
TABLE, PAGE = _DOCS / "kernels.json", _DOCS / "kernels.md"
STEPS = Path(__file__).with_name("collectives.json")
BEGIN, END = "<!-- compile gate: begin -->", "<!-- compile gate: end -->"

MORE_REGISTERS = 8  # ptxas rounds to eights
MORE_OPERATIONS = 1.05


def read() -> dict[str, Any]:
    """The committed table: `jax`, and `cases` as `Rows`."""
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {"jax": "", "cases": {}}


def write(jax_version: str, rows: Rows) -> None:
    """Replaces these rows in the table, and the page's table by the whole of it."""
    cases: Rows = read()["cases"]
    for name, targets in rows.items():
        cases[name] = cases.get(name, {}) | targets
    value = {"jax": jax_version, "cases": dict(sorted(cases.items()))}
    TABLE.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{markdown(value)}\n{END}{after}", encoding="utf-8")


def read_steps() -> dict[str, Any]:
    """Steps over meshes as committed: `jax`, and `cases` with bytes and collectives by name."""
    return json.loads(STEPS.read_text(encoding="utf-8")) if STEPS.exists() else {"jax": "", "cases": {}}


def write_step(jax_version: str, name: str, row: dict[str, Any]) -> None:
    """Replaces one of them."""
    cases = read_steps()["cases"] | {name: row}
    value = {"jax": jax_version, "cases": dict(sorted(cases.items()))}
    STEPS.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def problems(name: str, target: str, found: dict[str, Any], known: dict[str, Any], *, same_jax: bool) -> list[str]:
    """What is wrong with a kernel by itself, and, where the same JAX compiled both, beside the committed table."""
    where = f"{name} on {target}"
    if found["spill_bytes"]:
        return [f"{where}: spills {found['spill_bytes']} bytes"]
    old = known["cases"].get(name, {}).get(target)
    if old is None:
        return [f"{where}: is not in {TABLE.name}: run with --write"]
    if not same_jax:
        return []
    wrong: list[str] = []
    if found["registers"] > old["registers"] + MORE_REGISTERS:
        wrong.append(f"{where}: {found['registers']} registers, {old['registers']} in the table")
    if found["shared_memory"] > old["shared_memory"]:
        wrong.append(f"{where}: {found['shared_memory']} bytes of shared memory, {old['shared_memory']} in the table")
    ops, before = found["operations_a_weight"], old["operations_a_weight"]
    if ops is not None and (before is None or ops > before * MORE_OPERATIONS):
        wrong.append(f"{where}: {ops} operations a weight, {before} in the table")
    if found["tensor_core"] == 0 and old["tensor_core"]:
        wrong.append(f"{where}: no longer uses the matrix units")
    return wrong


def markdown(table: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"Compiled by JAX {table['jax']}.",
        "",
        "| kernel | GPU | registers | spilled bytes | shared memory, KiB | threads | operations a weight |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, targets in table["cases"].items():
        for target, row in targets.items():
            ops = "" if row["operations_a_weight"] is None else f"{row['operations_a_weight']:.2f}"
            cells = [row["registers"], row["spill_bytes"], f"{row['shared_memory'] / 1024:.1f}", row["threads"], ops]
            lines.append(f"| {name} | {target} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
