"""`python -m bench.sharding`: what a mesh costs and what it saves. Writes docs/sharding.json, docs/sharding.md and
docs/sharding.png.

Steps of real shapes are compiled for simulated devices: bytes that a device holds and what it exchanges are read from
what XLA compiled (`sharding_steps.py`). From these, `step_model.py` makes times of GPUs that are not here. Simulated
devices share this machine's cores: what a small model takes on them is shown, and says nothing of speed.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

DOCS = Path(__file__).parents[1] / "docs"
DEVICES = 8


def main(
    nvlink: Annotated[float, typer.Option(help="GB/s of one GPU, both directions together.")] = 900,
    hbm: Annotated[float, typer.Option(help="GB/s of one GPU's memory.")] = 4300,
    matrix: Annotated[float, typer.Option(help="TFLOP/s of one GPU in bfloat16.")] = 990,
    latency: Annotated[float, typer.Option(help="Microseconds of an exchange of nothing.")] = 10,
    only: Annotated[str | None, typer.Option(help="compile, run or render: the rest stays as it was.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="To compile; may be repeated. Default: all."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = DOCS,
) -> None:
    """Bytes, exchanges and modelled times of meshes."""
    if only not in (None, "compile", "run", "render"):
        raise typer.BadParameter(f"must be compile, run or render, got {only!r}", param_hint="--only")
    if model and only in ("run", "render"):
        raise typer.BadParameter(f"--only {only} compiles nothing: leave one of them out", param_hint="--model")
    # Read once, when JAX is imported. A CPU has no arithmetic in bfloat16: what XLA computes in float32 for it, it
    # would exchange in float32, too, which no GPU does.
    flags = f"--xla_force_host_platform_device_count={DEVICES} --xla_disable_hlo_passes=float-normalization-bf16"
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
    from atoma_jax.benchmarks.machine import describe_machine
    from bench import sharding_report, sharding_steps

    path = out / "sharding.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results["inputs"] = {"nvlink": nvlink * 1e9, "hbm": hbm * 1e9, "matrix": matrix * 1e12, "latency": latency * 1e-6}
    if only in (None, "compile"):
        unknown = [name for name in model or [] if name not in sharding_steps.MODELS]
        if unknown:
            problem = f"must be one of {', '.join(sharding_steps.MODELS)}, got {unknown[0]!r}"
            raise typer.BadParameter(problem, param_hint="--model")
        for name in model or sharding_steps.MODELS:
            results.setdefault("models", {})[name] = sharding_steps.compiled(name)
    if only in (None, "run"):
        results["steps"] = sharding_steps.run()
    if only != "render":
        results["machine"] = describe_machine()
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "sharding.md").write_text(sharding_report.markdown(results), encoding="utf-8")
    sharding_report.plot(results, out / "sharding.png")


if __name__ == "__main__":
    typer.run(main)
