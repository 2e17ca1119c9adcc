"""Chooses the tiles of products offline. Two steps, as the first needs no GPU and the second no compile gate:

`python -m bench.tune candidates` compiles every way to cut a product and keeps what fits (needs the extra `gate`);
`python -m bench.tune time` times those on the GPU of this machine and writes `pallas_kernels/tuned/DEVICE.json`, which
`pallas_kernels/tuning.py` reads. Nothing is tuned while serving.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pallas_kernels.tuning import MatmulTiles, default_tiles, matmul_key

CANDIDATES = Path(__file__).parent / "results" / "tune-candidates.json"
TUNED = Path(__file__).parents[1] / "pallas_kernels" / "tuned"

TYPES = ("Q4_0", "Q4_K", "Q8_0", "W4 g128", "ternary", "ternary × int8")
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # of Llama-3.1-8B
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
STACK = 8  # weights that timing goes through: more than a cache holds

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command()
def candidates(
    out: Annotated[Path, typer.Option(help="The list.")] = CANDIDATES,
    small: Annotated[bool, typer.Option(help="One product, few ways to cut it: shows that it runs.")] = False,
) -> None:
    """Compile every way for an H200; keep those that fit and do not spill."""
    from bench.compile_gate import aot  # first: sets XLA's flags
    from bench.compile_gate.resources import kernel_resources

    kept: list[dict[str, Any]] = []
    for type_name, M, N, K in _products(small):
        weight, run, arguments = _product(type_name, M, N, K, count=2)
        for tiles in itertools.islice(_ways(type_name, M, N, K, weight), 2 if small else None):
            try:
                aot.compiled(partial(run, tiles=tiles), arguments, "h200")
                (kernel, *_) = kernel_resources(aot.DUMP, "^(planar|ternary)_matmul")
            except Exception as error:  # most often: shared memory
                print(f"{type_name}, {M} × {K} → {N}, {tiles}: {str(error)[:120]}", flush=True)
                continue
            if not kernel.spill_bytes:
                kept.append({"type": type_name, "M": M, "N": N, "K": K, "tiles": dataclasses.asdict(tiles)})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(kept, indent=0) + "\n", encoding="utf-8")
    print(f"{len(kept)} candidates in {out}")


@app.command(name="time")
def measure(
    source: Annotated[Path, typer.Option("--candidates", help="What `candidates` wrote.")] = CANDIDATES,
    folder: Annotated[Path, typer.Option(help="Where the device's file goes.")] = TUNED,
    small: Annotated[bool, typer.Option(help="Interpreted, on any device: shows that it runs.")] = False,
) -> None:
    """Time the candidates here; keep the fastest of each product."""
    import jax

    from bench.gpu_sections.timing import seconds_a_turn
    from bench.real_models import random_value

    device = jax.devices()[0].device_kind
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    listed = json.loads(source.read_text(encoding="utf-8"))
    for (type_name, M, N, K), group in itertools.groupby(
        listed, key=lambda one: (one["type"], one["M"], one["N"], one["K"])
    ):
        weight, run, _ = _product(type_name, M, N, K, count=2 if small else STACK, interpret=small)
        values = random_value(weight)
        x = jax.random.normal(jax.random.key(0), (M, K), "bfloat16")
        times: dict[MatmulTiles, float] = {}
        for one in group:
            tiles = MatmulTiles(**one["tiles"])
            call = partial(run, tiles=tiles)

            def turn(i: Any, x: Any, weight: Any, call: Any = call) -> Any:
                return call(x, weight, i % weight.lead[0])

            times[tiles] = seconds_a_turn(turn, x, values, turns=1 if small else 4 * STACK)
        best = min(times, key=lambda tiles: times[tiles])
        key = matmul_key(M=M, N=N, K=K, bits=weight.bits, group=weight.group)
        found.setdefault(_operation(type_name), {})[key] = dataclasses.asdict(best)
        print(f"{type_name}, {key}: {1e6 * times[best]:.1f} µs with {best}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _products(small: bool) -> Iterator[tuple[str, int, int, int]]:
    if small:
        yield "Q4_0", 1, 128, 512
        return
    for type_name, (N, K), M in itertools.product(TYPES, SHAPES, ROWS):
        yield type_name, M, N, K


def _ways(type_name: str, M: int, N: int, K: int, weight: Any) -> Iterator[MatmulTiles]:
    """Every way to cut a product, the default one first."""
    yield default_tiles(_operation(type_name), M=M, N=N, K=K, bits=weight.bits, group=weight.group)
    rows = [block for block in (16, 32, 64, 128, 256) if block == 16 or block < 2 * M]
    splits = (1, 2, 4, 8) if M <= 64 else (1, 2)
    for block_n, block_m, parts, warps, stages in itertools.product((32, 64, 128), rows, splits, (4, 8), (2, 3, 4, 5)):
        yield MatmulTiles(block_n=block_n, block_m=block_m, splits=parts, warps=warps, stages=stages)


def _operation(type_name: str) -> str:
    return "ternary_matmul" if type_name.endswith(" × int8") else "planar_matmul"


def _product(type_name: str, M: int, N: int, K: int, *, count: int, interpret: bool = False) -> tuple[Any, Any, Any]:
    """An abstract stack of weights, the function of (x, weight, index, tiles=…), and its abstract arguments."""
    import jax
    import jax.numpy as jnp

    from bench.real_models import packed_weight
    from pallas_kernels.planar_matmul import PlanarFormat, PlanarStack, planar_matmul
    from pallas_kernels.ternary_matmul import ternary_matmul

    weight = packed_weight(type_name.removesuffix(" × int8"), count, N, K)
    kind = PlanarFormat(weight.bits, weight.plane, weight.group, weight.zero, weight.table)

    def run(x: Any, weight: Any, index: Any, *, tiles: MatmulTiles) -> Any:
        if _operation(type_name) == "ternary_matmul":
            return ternary_matmul(x, weight.codes, weight.scales, index, kind, tiles, interpret=interpret)
        stack = PlanarStack(weight.codes, weight.scales, weight.mins, weight.scale_supers, weight.min_supers)
        return planar_matmul(x, stack, index, kind, tiles, interpret=interpret)

    arguments = (jax.ShapeDtypeStruct((M, K), jnp.bfloat16), weight, jax.ShapeDtypeStruct((), jnp.int32))
    return weight, run, arguments


if __name__ == "__main__":
    app()
