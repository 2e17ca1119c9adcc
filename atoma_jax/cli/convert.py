"""`atoma-jax convert`: a model into the engine's own layout, and back into GGUF; the work is `engine/convert.py`'s."""

from pathlib import Path
from typing import Annotated

import typer

from atoma_jax.cli.common import print_json
from atoma_jax.config import EngineConfig
from atoma_jax.errors import ConfigError

_TARGETS = ("orbax", "gguf")


def convert(
    model: Annotated[str, typer.Argument(help="A name of configs/models, a .gguf file, a folder, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; with --to gguf the file.")],
    to: Annotated[
        str,
        typer.Option(help="orbax: for this engine and this platform. gguf: back, from such a folder, in float32."),
    ] = "orbax",
    dtype: Annotated[str | None, typer.Option(help="Of matrix products: auto, float32 or bfloat16.")] = None,
    weight_layout: Annotated[
        str | None, typer.Option(help="Of quantized weights: auto (for this platform), rows or planar.")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Of dense weights: int8, int4, fp8, ternary, or w8a8.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens that will be served, for models that rotate long contexts otherwise.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit, for hub ids.")] = None,
    threads: Annotated[int | None, typer.Option(help="That decode at once; default: one a core.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what an earlier conversion left at OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object.")] = False,
) -> None:
    """Write a model as the engine holds it, so that it starts without decoding; or such a model as GGUF again."""
    if to not in _TARGETS:
        raise ConfigError("to", to, f"must be one of {', '.join(_TARGETS)}")
    for name, value in (("quantization", quantization), ("dtype", dtype), ("weight_layout", weight_layout)):
        if to == "gguf" and value is not None:
            raise ConfigError(
                name, value, "has no effect with --to gguf, whose values are float32: see `atoma-jax quantize`"
            )
    given = {
        "model": model,
        "dtype": dtype,
        "weight_layout": weight_layout,
        "quantization": quantization,
        "max_model_len": max_model_len,
        "revision": revision,
    }
    config = EngineConfig.from_options({name: value for name, value in given.items() if value is not None}).model
    from atoma_jax import convert_model, export_gguf  # imports JAX

    write = convert_model if to == "orbax" else export_gguf
    done = write(config, out, force=force, threads=threads, progress=not as_json)
    if as_json:
        print_json(
            {
                "model": model,
                "path": str(done.path.absolute()),
                "kind": done.kind,
                "weight_layout": done.layout,
                "dtype": done.operands,
                "source_bytes": done.source_bytes,
                "weight_bytes": done.weight_bytes,
                "file_bytes": done.file_bytes,
                "seconds": done.seconds,
            }
        )
        return
    typer.echo(done.path.absolute())
    typer.echo(
        f"{done.source_bytes / 1e6:,.1f} MB read in {done.seconds['read']:.2f} s, "
        f"{done.file_bytes / 1e6:,.1f} MB written in {done.seconds['write']:.2f} s",
        err=True,
    )
    if "restore" in done.seconds:
        typer.echo(
            f"weights are on the device in {done.seconds['restore']:.2f} s from here, checksums included, "
            f"and were in {done.seconds['read']:.2f} s from {model}",
            err=True,
        )
