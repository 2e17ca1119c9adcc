"""What each quantized type costs in accuracy and in bits: `python -m bench.accuracy --no-speed`; without the flag where
nothing else runs on the machine.

Makes files of every type from one base in F32, compares each with the base over a text (`atoma-jax eval kld`, but with
the base loaded once), and writes a table, a plot and all numbers: OUT.md, OUT.png, OUT.json. Rows that OUT.json has
already keep what a run does not measure, so accuracy and speed can be taken apart. How the table looks is
`accuracy_report.py`'s; how files of types that `atoma-jax quantize` does not write are made is `ggml_files.py`'s.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from atoma_jax import EngineConfig, ModelPair, Scorer, UserError, plan_model
from atoma_jax.benchmarks.machine import describe_machine
from atoma_jax.evaluation import diverge, split_special
from atoma_jax.loading.fetch.hub import resolve
from bench.accuracy_report import BASE, plot, render
from bench.ggml_files import rewrite

ROOT = Path(__file__).resolve().parent.parent
TAIL = 800  # characters of a failed program's messages
Maker = Literal["quantize", "libgguf", "source", "base"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: as it is asked for and shown.
        maker: of its file: `atoma-jax quantize`, libgguf, or none: the model as it was fetched, or the base.
        settings: of the engine, beside the model.
        peer: its line in llama.cpp's ladder, if there is one.
    """

    name: str
    maker: Maker = "quantize"
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    peer: str | None = None


def _rows() -> tuple[Row, ...]:
    """Every row, by how the model is kept: files from many bits to few, then what is done to a dense model."""
    in_ladder = {"F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "IQ4_NL", "TQ2_0"}
    written = (
        *("F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4"),
        *("Q3_K_M", "Q2_K", "TQ1_0", "TQ2_0"),
    )
    others = ("NVFP4", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q1_0")
    return (
        Row(name=BASE, maker="base", peer="F32/f32kv"),
        Row(name="source", maker="source", peer="SRC"),
        *(Row(name=name, peer=name if name in in_ladder else None) for name in written),
        *(Row(name=name, maker="libgguf") for name in others),
        *(
            Row(name=f"load:{scheme}", maker="base", settings={"quantization": scheme})
            for scheme in ("int8", "w8a8", "fp8", "int4", "ternary")
        ),
        *(
            Row(
                name=f"KV:{kind}",
                maker="base",
                settings={"kv_cache_dtype": kind},
                peer="KV:q8_0" if kind == "int8" else None,
            )
            for kind in ("bfloat16", "float16", "fp8_e4m3", "int8")
        ),
    )


ROWS = {row.name: row for row in _rows()}


class RowError(Exception):
    """A row cannot be measured; the message names it and says why."""

    def __init__(self, row: Row, problem: object):
        super().__init__(f"row {row.name}: {problem}")


def main(
    model: Annotated[str, typer.Option(help="A GGUF file, or a name or hub id of one.")] = "smollm2-135m-instruct",
    rows: Annotated[str, typer.Option(help="Names, separated by commas; default: all.")] = ",".join(ROWS),
    text: Annotated[Path, typer.Option(help="A UTF-8 text.")] = ROOT / "tests" / "data" / "ppl_text.txt",
    max_tokens: Annotated[int, typer.Option(min=2, help="Of the text.")] = 1024,
    dtype: Annotated[str, typer.Option(help="Of matrix products; float32 shows the types alone.")] = "float32",
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Also times; nothing else may run.")] = True,
    accuracy: Annotated[bool, typer.Option("--accuracy/--no-accuracy", help="Whether scores are computed.")] = True,
    ladder: Annotated[Path | None, typer.Option(help="llama.cpp's numbers for the same model and text.")] = None,
    files: Annotated[
        Path | None, typer.Option(help="Folder that keeps the files made; default: none are kept.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = ROOT / "docs" / "accuracy",
) -> None:
    """Measure types and write the table."""
    chosen = select(rows)
    header = {"model": model, "text": text.name, "max_tokens": max_tokens, "dtype": dtype}
    results = read_results(out.with_suffix(".json"), header)
    failed: list[RowError] = []
    with tempfile.TemporaryDirectory(prefix="atoma-jax-") as temporary:
        folder = files or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        workshop = Workshop(model, folder)
        meter = Meter(workshop.base, text.read_text(encoding="utf-8"), max_tokens, dtype) if accuracy else None
        for row in chosen:
            try:
                measured = measure(row, workshop.path(row), meter, dtype=dtype, speed=speed)
            except RowError as error:
                print(error, file=sys.stderr, flush=True)
                failed.append(error)
                continue
            before = results["rows"].get(row.name, {})
            kept = {key: value for key, value in before.items() if not key.endswith("_bits")}  # every run has those
            results["rows"][row.name] = {**kept, **measured}
            print(f"{row.name}: {json.dumps(measured)}", flush=True)
            if accuracy:
                results["machine"] = describe_machine()
            if speed:
                results["speed_machine"] = describe_machine()
            save(results, out)
    peers = json.loads(ladder.read_text(encoding="utf-8")) if ladder is not None else {}
    order = [name for name in ROWS if name in results["rows"]]
    out.with_suffix(".md").write_text(
        render(results, order, {row.name: peers[row.peer] for row in ROWS.values() if row.peer in peers}),
        encoding="utf-8",
    )
    plot(results, order, out.with_suffix(".png"))
    if failed:
        raise SystemExit(f"{len(failed)} of {len(chosen)} rows failed")


def select(names: str) -> list[Row]:
    """The rows named, in the table's order.

    Raises:
        BadParameter: there is none of a name.
    """
    wanted = [name for name in names.split(",") if name]
    unknown = [name for name in wanted if name not in ROWS]
    if unknown or not wanted:
        raise typer.BadParameter(f"{unknown or names!r}: rows are {', '.join(ROWS)}", param_hint="--rows")
    return [row for row in ROWS.values() if row.name in wanted]


def read_results(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """What earlier runs measured, or nothing yet.

    Raises:
        BadParameter: they measured something else.
    """
    if not path.exists():
        return {**header, "rows": {}}
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name, value in header.items():
        if results[name] != value:
            problem = f"{path} has {name} = {results[name]!r}, not {value!r}: name another path"
            raise typer.BadParameter(problem, param_hint="--out")
    return results


def save(results: Mapping[str, Any], out: Path) -> None:
    """Writes all numbers, after every row: a run that breaks off has not been for nothing."""
    out.with_suffix(".json").write_text(json.dumps(results, indent=1, allow_nan=True) + "\n", encoding="utf-8")


def measure(row: Row, path: Path, meter: "Meter | None", *, dtype: str, speed: bool) -> dict[str, float | int | None]:
    """One row's numbers: bits, and what was asked for of scores and times.

    Raises:
        RowError: the engine refuses the file or a setting.
    """
    options: dict[str, Any] = {"model": str(path), **row.settings}
    try:
        numbers: dict[str, float | int | None] = {**bits(options)}
        if meter is not None:
            numbers |= meter.scores({**options, "dtype": dtype, "kernels": "xla"})
    except UserError as error:
        raise RowError(row, error) from error
    return numbers | speeds(row, path) if speed else numbers


def bits(options: Mapping[str, Any]) -> dict[str, float]:
    """Bits a weight: in the file, and on this platform's device in either layout of quantized weights that there is."""
    found: dict[str, float] = {}
    for layout in ("rows",) if options.get("quantization") == "w8a8" else ("planar", "rows"):
        plan = plan_model(EngineConfig.from_options({**options, "weight_layout": layout}))
        found["file_bits"] = 8 * plan.file_bytes / plan.parameters
        found[f"{layout}_bits"] = 8 * plan.weight_bytes / plan.parameters
    return found


class Meter:
    """The base on the device, and the text that others are compared with it over."""

    def __init__(self, base: Path, text: str, max_tokens: int, dtype: str):
        """Loads the base."""
        self._base = Scorer.load(EngineConfig.from_options({"model": str(base), "dtype": dtype, "kernels": "xla"}))
        self._before, ids = split_special(self._base.tokenizer, text)
        self._ids = ids[:max_tokens]

    def scores(self, options: Mapping[str, Any]) -> dict[str, float | int | None]:
        """`Divergence.summary` of the model that `options` describe, over one window."""
        pair = ModelPair(self._base, Scorer.load(EngineConfig.from_options(dict(options))))
        context = len(self._before) + len(self._ids)
        result = diverge(
            pair, self._ids, before=self._before, context=context, stride=context - 2, on_tokens=lambda _: None
        )
        return result.summary()


def speeds(row: Row, path: Path) -> dict[str, float]:
    """Seconds of loading the weights, and tokens a second of one sequence, in a process of its own."""
    flags = [part for name, value in row.settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    sizes = ["--num-seqs", "1", "--prompt-tokens", "512", "--output-tokens", "64", "--repeats", "3"]
    report = json.loads(_program(row, "bench", "throughput", "--model", str(path), *flags, *sizes, "--json"))
    return {
        "load_s": report["startup_phases_s"]["weights"],
        "prefill_tokens_per_s": report["prefill_tokens_per_s"],
        "decode_tokens_per_s": report["decode_tokens_per_s"],
    }


class Workshop:
    """Makes the files, each once, and finds those that are there."""

    def __init__(self, model: str, folder: Path):
        """Makes the base."""
        self._source, self._folder = resolve(model).path, folder
        self.base = self._quantized(ROWS[BASE], self._source, "F32")

    def path(self, row: Row) -> Path:
        """The row's file.

        Raises:
            RowError: it cannot be made.
        """
        match row.maker:
            case "base":
                return self.base
            case "source":
                return self._source
            case "quantize":
                return self._quantized(row, self.base, row.name)
            case "libgguf":
                target = self._folder / f"{row.name}.gguf"
                if not target.exists():
                    try:
                        rewrite(self.base, target, row.name)
                    except ImportError as error:
                        raise RowError(row, f"{error}; pip install 'atoma-jax[bench]'") from error
                return target

    def _quantized(self, row: Row, source: Path, mixture: str) -> Path:
        target = self._folder / f"{mixture}.gguf"
        if not target.exists():
            _program(row, "quantize", str(source), str(target), "--type", mixture)
        return target


def _program(row: Row, *arguments: str) -> str:
    """What `atoma-jax` prints."""
    command = [sys.executable, "-m", "atoma_jax.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RowError(row, f"atoma-jax {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-TAIL:]}")
    return done.stdout


if __name__ == "__main__":
    typer.run(main)
