"""`atoma-jax plan`: what a model takes and what fits beside it; the arithmetic is `engine/model_plan.py`'s."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from atoma_jax.cli.common import parse_bytes, print_json
from atoma_jax.config import EngineConfig
from atoma_jax.errors import UserError

if TYPE_CHECKING:
    from atoma_jax import ModelPlan


def plan(
    model: Annotated[str, typer.Argument(help="A name of configs/models, a .gguf file, a folder, or a hub id.")],
    memory: Annotated[
        str | None,
        typer.Option(help="What the engine may use of a device: 80GB, 24GiB, or bytes. Default: no limit."),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(help="Spread over devices: fsdp=4,tensor=2, a name of configs/mesh, or a .toml file."),
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of the sequences that are counted.")] = None,
    platform: Annotated[str | None, typer.Option(help="cpu or cuda; default: of this machine.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit, for hub ids.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of matrix products: auto, float32 or bfloat16.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Of dense weights while they load: int8, int4, fp8, ternary or w8a8.")
    ] = None,
    weight_layout: Annotated[str | None, typer.Option(help="auto, rows (a byte a code) or planar (packed).")] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, fp8_e4m3 or int8.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens of a KV page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object.")] = False,
) -> None:
    """What a model takes on a device, and which contexts fit, from headers. A model that is not here is fetched."""
    if platform not in (None, "cpu", "cuda"):
        raise UserError("platform", platform, "must be cpu or cuda")
    limit = None if memory is None else parse_bytes("memory", memory)
    options = {
        "model": model,
        "mesh": mesh,
        "max_model_len": max_model_len,
        "revision": revision,
        "dtype": dtype,
        "quantization": quantization,
        "weight_layout": weight_layout,
        "kv_cache_dtype": kv_cache_dtype,
        "block_size": block_size,
    }
    config = EngineConfig.from_options({name: value for name, value in options.items() if value is not None})
    from atoma_jax import plan_model  # imports JAX

    found = plan_model(config, memory=limit, platform=platform)
    if as_json:
        print_json(_as_json(model, found))
    else:
        _show(model, found)


def _as_json(model: str, found: "ModelPlan") -> dict[str, Any]:
    return {
        "model": model,
        "architecture": found.architecture,
        "parameters": found.parameters,
        "file_bytes": found.file_bytes,
        "types": {
            name: {"tensors": kind.tensors, "parameters": kind.parameters, "file_bytes": kind.file_bytes}
            for name, kind in found.types.items()
        },
        "platform": found.platform,
        "mesh": found.mesh,
        "slices": found.slices,
        "weight_layout": found.layout,
        "weight_bytes": found.weight_bytes,
        "weights": dict(found.weights),
        "kv_cache_dtype": found.kv_dtype,
        "kv_bytes_per_token": found.kv_bytes_per_token,
        "context_length": found.context_length,
        "max_model_len": found.max_model_len,
        "workspace_bytes": found.workspace,
        "memory": found.memory,
        "kv_bytes": found.kv_bytes,
        "longest_context": found.longest_context,
        "max_sequences": found.max_sequences,
    }


def _show(model: str, found: "ModelPlan") -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{model}: {found.architecture}, {found.parameters / 1e6:,.1f} M parameters")
    table = Table("type", "tensors", "parameters", "file", "bits each", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, kind in found.types.items():
        table.add_row(name, f"{kind.tensors:,}", f"{kind.parameters:,}", size(kind.file_bytes), f"{kind.bits:.2f}")
    console.print(table)
    if found.mesh is None:
        bits = 8 * found.weight_bytes / found.parameters
        of_weights = f"{size(found.weight_bytes)} of weights ({found.layout}, {bits:.2f} bits each)"
        console.print(f"on {found.platform:<13}{of_weights}")
    else:
        console.print(f"mesh            {found.mesh}; what follows is of each device")
        console.print(f"on {found.platform:<13}{size(found.weight_bytes)} of weights ({found.layout})")
    console.print(f"a token         {size(found.kv_bytes_per_token)} of KV cache in {found.kv_dtype}")
    if found.kv_bytes is None:
        console.print("--memory 80GB shows what fits.")
    elif found.kv_bytes < 0:
        console.print(f"does not fit    {size(-found.kv_bytes)} are missing before the first token")
    else:
        console.print(f"cache           {size(found.kv_bytes)} are left of {size(found.memory or 0)}")
        console.print(f"longest context {found.longest_context:,} tokens, of {found.context_length:,} trained for")
        console.print(f"at once         {found.max_sequences:,} sequences of {found.max_model_len:,} tokens")


def size(count: int) -> str:
    """Bytes for people, in powers of ten as disks and `--memory 80GB` count."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"
