"""`atoma-jax quantize IN OUT --type Q4_K_M`: flags and printing; `loading/gguf/requantize.py` does the work."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from atoma_jax.cli.common import print_json
from atoma_jax.errors import UserError
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.gguf.mixtures import MIXTURES, TypeOptions
from atoma_jax.loading.gguf.requantize import Summary, requantize


def quantize(
    model: Annotated[str, typer.Argument(metavar="IN", help="A GGUF file, or a name or hub id of one.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The GGUF file to write.")],
    mixture: Annotated[str, typer.Option("--type", "-t", help=f"Of most tensors: {', '.join(MIXTURES)}.")],
    token_embedding_type: Annotated[str | None, typer.Option(help="Of the token embedding alone.")] = None,
    output_tensor_type: Annotated[str | None, typer.Option(help="Of the output matrix alone.")] = None,
    pure: Annotated[bool, typer.Option("--pure", help="One type for all matrices; no more bits for some.")] = False,
    threads: Annotated[int | None, typer.Option(help="That quantize; default: one a core.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object.")] = False,
) -> None:
    """Write a GGUF file with other tensor types, chosen as llama.cpp does."""
    options = TypeOptions.named(
        mixture, token_embedding_type=token_embedding_type, output_tensor_type=output_tensor_type, pure=pure
    )
    source = resolve(model)
    if source.kind != "gguf":
        raise UserError("model", model, "is a folder of safetensors, and only GGUF files can be quantized; name one")
    with tqdm(unit="weight", unit_scale=True, desc="quantizing", delay=1) as bar:  # warnings come first

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        summary = requantize(
            source.path,
            out,
            options,
            threads=threads,
            overwrite=force,
            on_progress=show,
        )
    if as_json:
        print_json({"model": model, "out": str(out), "type": options.mixture.name, **_as_json(summary)})
    else:
        typer.echo(_as_text(summary, out))


def _as_json(summary: Summary) -> dict[str, Any]:
    types = [dataclasses.asdict(total) | {"bits": total.bits} for total in summary.types]
    return dataclasses.asdict(summary) | {"bits": 8 * summary.target_bytes / summary.elements, "types": types}


def _as_text(summary: Summary, out: Path) -> str:
    lines = [
        f"{total.type:<8}{total.tensors:>6} tensors {total.bits:7.3f} bits a weight {_megabytes(total.nbytes):>14}"
        for total in summary.types
    ]
    if summary.fallbacks:
        lines.append(f"{len(summary.fallbacks)} tensors have rows that their type does not fit and took another")
    bits = 8 * summary.target_bytes / summary.elements
    before = f"{_megabytes(summary.source_bytes)} → {_megabytes(summary.target_bytes)}"
    return "\n".join([*lines, f"{before}, {bits:.3f} bits a weight: {out}"])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
