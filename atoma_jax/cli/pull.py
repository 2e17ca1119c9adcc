"""`atoma-jax pull`: brings a model to this machine and prints where it is. Exit codes are the caller's (`cli`)."""

import json
from pathlib import Path
from typing import Annotated

import typer

from atoma_jax.loading.fetch.hub import resolve


def pull(
    name: Annotated[str, typer.Argument(help="A name of configs/models, or a hub id: org/name, org/name:file.gguf.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit, for hub ids.")] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Folder to keep models in; default: the user's cache folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object with name, path and kind.")] = False,
) -> None:
    """Fetch a model, check it, and print its path on standard output."""
    model = resolve(name, revision=revision, cache_dir=cache_dir, verify=True)
    if as_json:
        typer.echo(json.dumps({"name": model.name, "path": str(model.path.absolute()), "kind": model.kind}))
    else:
        typer.echo(model.path.absolute())
