"""`atoma-jax bench throughput | latency | startup`: flags and printing; the measuring is `atoma_jax/benchmarks`.

`bench serve`, which needs no engine, is `bench_serve.py`.
"""

from typing import Annotated, Any

import typer

from atoma_jax.benchmarks.latency import LatencyWorkload, measure_latency
from atoma_jax.benchmarks.machine import describe_machine
from atoma_jax.benchmarks.startup import Start, measure_startup
from atoma_jax.benchmarks.throughput import ThroughputWorkload, measure_throughput
from atoma_jax.cli.bench_serve import serve
from atoma_jax.cli.common import EngineOptions, print_json, running_engine
from atoma_jax.cli.options import flat_options
from atoma_jax.errors import UserError

bench = typer.Typer(name="bench", help="Measure this engine on this machine, or a server.", no_args_is_help=True)
bench.command()(serve)

_Json = Annotated[bool, typer.Option("--json", help="Print one object.")]
_Repeats = Annotated[int, typer.Option(min=1, help="Runs that count; medians are over them.")]
_Warmup = Annotated[int, typer.Option(min=0, help="Runs before, that do not count.")]
_PromptSeed = Annotated[int, typer.Option(min=0, help="Seed of the random prompts.")]


@bench.command()
@flat_options
def throughput(
    engine: EngineOptions,
    num_seqs: Annotated[int, typer.Option(min=1, help="Sequences, all at once.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each sequence.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="Of each sequence.")] = 64,
    repeats: _Repeats = 3,
    warmup: _Warmup = 1,
    prompt_seed: _PromptSeed = 0,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    logprobs: Annotated[int | None, typer.Option(help="Logprobs of as many of the likeliest tokens.")] = None,
    as_json: _Json = False,
) -> None:
    """Tokens a second with many sequences at once: prefill, decode, and both together."""
    work = ThroughputWorkload(
        num_seqs=num_seqs,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        repeats=repeats,
        warmup=warmup,
        seed=prompt_seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        logprobs=logprobs,
    )
    work.params()  # what is wrong with them is said before there is an engine
    config = engine.engine_config()
    with running_engine(config) as running:
        typer.echo(f"{warmup} + {repeats} runs of {num_seqs} × ({prompt_tokens} + {output_tokens}) tokens", err=True)
        result = measure_throughput(running.llm, work)
        _print({"model": config.model.model, **result, **running.startup_json(), **describe_machine()}, as_json)


@bench.command()
@flat_options
def latency(
    engine: EngineOptions,
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 32,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    num_iters_warmup: _Warmup = 3,
    num_iters: _Repeats = 10,
    prompt_seed: _PromptSeed = 0,
    as_json: _Json = False,
) -> None:
    """Seconds that a batch takes from the call to its last token."""
    work = LatencyWorkload(
        input_len=input_len,
        output_len=output_len,
        batch_size=batch_size,
        num_iters_warmup=num_iters_warmup,
        num_iters=num_iters,
        seed=prompt_seed,
    )
    config = engine.engine_config()
    with running_engine(config) as running:
        typer.echo(f"{num_iters_warmup} + {num_iters} runs of {batch_size} × ({input_len} + {output_len})", err=True)
        result = measure_latency(running.llm, work)
        _print({"model": config.model.model, **result, **running.startup_json(), **describe_machine()}, as_json)


@bench.command()
@flat_options
def startup(
    engine: EngineOptions,
    num_iters_cold: Annotated[int, typer.Option(min=0, help="Starts with an empty compile cache.")] = 1,
    num_iters_warm: Annotated[int, typer.Option(min=0, help="Starts with a filled one.")] = 3,
    as_json: _Json = False,
) -> None:
    """Seconds from a new process to its first token, cold and warm. Uses a compile cache of its own."""
    config = engine.engine_config()
    if config.mesh.coordinator_address is not None:
        problem = (
            "is not for bench startup, whose programs start by themselves: time one start of all processes instead"
        )
        raise UserError("coordinator_address", config.mesh.coordinator_address, problem)
    result = measure_startup(
        engine.as_flags(), num_iters_cold=num_iters_cold, num_iters_warm=num_iters_warm, on_start=_report_start
    )
    _print({"model": config.model.model, **result, **describe_machine()}, as_json)


def _report_start(kind: str, start: Start) -> None:
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in start.phases.items())
    typer.echo(f"{kind}: {start.seconds:.2f} s to the first token ({phases})", err=True)


def _print(result: dict[str, Any], as_json: bool) -> None:
    """The object as JSON, or its entries as lines."""
    if as_json:
        print_json(result)
        return
    for name, value in result.items():
        if not isinstance(value, list):
            typer.echo(f"{name:<22}{_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 100 else f"{value:.1f}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    return "-" if value is None else str(value)
