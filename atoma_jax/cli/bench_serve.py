"""`atoma-jax bench serve`: flags and printing; the measuring is `atoma_jax/benchmarks/serve`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from atoma_jax.benchmarks.serve.lengths import RandomLengths
from atoma_jax.benchmarks.serve.plot import check_plot, plot_sweep
from atoma_jax.benchmarks.serve.workload import Pace, ServeWorkload, SweepPlan
from atoma_jax.cli.common import print_json
from atoma_jax.cli.options import flat_options
from atoma_jax.errors import AtomaError, UserError

_SHOWN = (
    *("completed", "failed", "duration", "request_throughput", "request_goodput", "output_throughput"),
    *("total_token_throughput", "max_output_tokens_per_s", "max_concurrent_requests"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Where requests go, what they are, how they are spread over time, and what is shown."""

    base_url: Annotated[str, typer.Option(help="Of the server, with or without /v1.")] = "http://127.0.0.1:8000"
    api_key: Annotated[
        str | None, typer.Option(envvar=["ATOMA_JAX_API_KEY", "OPENAI_API_KEY"], help="What the server asks for.")
    ] = None
    model: Annotated[str | None, typer.Option(help="As the server calls it; default: the first it names.")] = None
    backend: Annotated[
        Literal["openai", "openai-chat"], typer.Option(help="/v1/completions or /v1/chat/completions.")
    ] = "openai"
    dataset_name: Annotated[
        Literal["random", "sharegpt-like", "sharegpt"],
        typer.Option(help="Lengths: uniform; log-normal as ShareGPT's; or its texts out of --dataset-path."),
    ] = "random"
    dataset_path: Annotated[Path | None, typer.Option(help="A JSON file of ShareGPT's form.")] = None
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests of a run.")] = 100
    random_input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128
    random_output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128
    random_range_ratio: Annotated[float, typer.Option(min=0, max=1, help="Lengths differ by up to this share.")] = 0.0
    random_prefix_len: Annotated[int, typer.Option(min=0, help="Further tokens that all prompts begin with.")] = 0
    sharegpt_output_len: Annotated[int | None, typer.Option(min=1, help="Instead of the answers' own.")] = None
    request_rate: Annotated[float, typer.Option(min=0, help="Requests a second; inf: all at once.")] = float("inf")
    burstiness: Annotated[float, typer.Option(help="Shape of the gaps: 1 Poisson, below: bursts.")] = 1.0
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Unanswered requests at most.")] = None
    num_warmups: Annotated[int, typer.Option(min=0, help="Requests before, all at once, that do not count.")] = 1
    seed: Annotated[int, typer.Option(min=0, help="Of lengths, prompts and gaps.")] = 0
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--no-ignore-eos", help="Answers of exactly the length asked for.")
    ] = True
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0
    extra_body: Annotated[str | None, typer.Option(help="A JSON object whose keys go into every request.")] = None
    goodput: Annotated[
        list[str] | None, typer.Option(help="A limit in ms, as ttft:200, tpot:50 or e2el:3000; may be repeated.")
    ] = None
    metric_percentiles: Annotated[str, typer.Option(help="Which are shown, with commas between.")] = "99"
    timeout: Annotated[float, typer.Option(help="Seconds without a byte until a request has failed.")] = 600.0
    sweep_rates: Annotated[str | None, typer.Option(help="A run for each of these request rates: 1,2,4,inf.")] = None
    sweep_concurrency: Annotated[str | None, typer.Option(help="A run for each of these: 1,2,4,8.")] = None
    plot: Annotated[Path | None, typer.Option(help="Draw the sweep's throughput against latency, as PNG.")] = None
    label: Annotated[str | None, typer.Option(help="Goes into the object as it is.")] = None
    detail: Annotated[bool, typer.Option("--detail/--no-detail", help="Each request's numbers in --json.")] = True

    def check(self) -> None:
        """Raises `UserError` for a value outside its limits, and for two that contradict each other."""
        for name in ("burstiness", "request_rate", "timeout"):
            if not getattr(self, name) > 0:
                raise UserError(name, getattr(self, name), "must be above 0")
        if (self.dataset_name == "sharegpt") != (self.dataset_path is not None):
            path = None if self.dataset_path is None else str(self.dataset_path)
            raise UserError("dataset_path", path, "goes with --dataset-name sharegpt, which needs it")
        if self.sweep_rates is not None and self.sweep_concurrency is not None:
            raise UserError("sweep_rates", self.sweep_rates, "contradicts --sweep-concurrency: give one of them")
        if self.plot is not None and self.sweep_rates is None and self.sweep_concurrency is None:
            raise UserError("plot", str(self.plot), "draws a sweep: give --sweep-rates or --sweep-concurrency")

    def workload(self) -> ServeWorkload:
        """What is sent."""
        lengths = RandomLengths(
            input_len=self.random_input_len, output_len=self.random_output_len, range_ratio=self.random_range_ratio
        )
        pace = Pace(
            request_rate=self.request_rate,
            burstiness=self.burstiness,
            max_concurrency=self.max_concurrency,
            seed=self.seed,
        )
        return ServeWorkload(
            base_url=self.base_url,
            api_key=self.api_key,
            model=self.model,
            chat=self.backend == "openai-chat",
            dataset=self.dataset_name,
            dataset_path=self.dataset_path,
            num_prompts=self.num_prompts,
            lengths=lengths,
            prefix_len=self.random_prefix_len,
            sharegpt_output_len=self.sharegpt_output_len,
            pace=pace,
            num_warmups=self.num_warmups,
            seed=self.seed,
            timeout=self.timeout,
            body=_body(ignore_eos=self.ignore_eos, temperature=self.temperature, extra=self.extra_body),
            goodput=_limits(self.goodput or []),
            percentiles=_numbers("metric_percentiles", self.metric_percentiles, highest=100.0),
            detail=self.detail,
            label=self.label,
        )

    def sweep(self) -> SweepPlan | None:
        """One run a value, where several are asked for."""
        if self.sweep_rates is not None:
            return SweepPlan(over="request_rate", values=_numbers("sweep_rates", self.sweep_rates))
        if self.sweep_concurrency is not None:
            values = _numbers("sweep_concurrency", self.sweep_concurrency, highest=1e6)
            if any(value != int(value) for value in values):
                raise UserError("sweep_concurrency", self.sweep_concurrency, "must be whole numbers")
            return SweepPlan(over="max_concurrency", values=values)
        return None


@flat_options
def serve(
    options: ServeOptions, as_json: Annotated[bool, typer.Option("--json", help="Print one object.")] = False
) -> None:
    """Load any OpenAI-compatible server: TTFT, TPOT, ITL, E2EL, throughput and goodput."""
    options.check()
    work, sweep = options.workload(), options.sweep()
    try:
        from atoma_jax.benchmarks.serve.run import measure_serve
    except ModuleNotFoundError as error:
        raise UserError("bench serve", error.name, "needs httpx: pip install 'atoma-jax[server]'") from error
    if options.plot is not None:
        check_plot(options.plot)
    result = measure_serve(work, sweep, lambda one: _report(one, quiet=as_json))
    if sweep is not None and options.plot is not None:
        plot_sweep(result["runs"], sweep.over, options.plot)
    if as_json:
        print_json(result)
    if not any(one["completed"] for one in ([result] if sweep is None else result["runs"])):
        raise AtomaError("bench serve: every request failed; --json shows their errors")


def _body(*, ignore_eos: bool, temperature: float, extra: str | None) -> dict[str, Any]:
    """What all requests have in common."""
    body: dict[str, Any] = {"temperature": temperature}
    if ignore_eos:
        body["ignore_eos"] = True
    if extra is None:
        return body
    try:
        further: Any = json.loads(extra)
    except ValueError as error:
        raise UserError("extra_body", extra, f"must be a JSON object ({error})") from error
    if not isinstance(further, dict):
        raise UserError("extra_body", extra, "must be a JSON object")
    return {**body, **further}


def _numbers(field: str, text: str, *, highest: float = float("inf")) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(field, text, "must be numbers with commas between") from None
    if not all(0 < value <= highest for value in values):
        raise UserError(field, text, f"must be numbers above 0, up to {highest:g}")
    return values


def _limits(words: list[str]) -> dict[str, float]:
    limits: dict[str, float] = {}
    for word in words:
        name, _, number = word.partition(":")
        if name not in ("ttft", "tpot", "e2el"):
            raise UserError("goodput", word, "must be ttft, tpot or e2el, a colon, and milliseconds")
        limits[name] = _numbers("goodput", number)[0]
    return limits


def _report(result: dict[str, Any], *, quiet: bool) -> None:
    """A run for people: on standard output, or beside the object."""
    lines = [f"{name:<26}{_number(result[name])}" for name in _SHOWN if result[name] is not None]
    for metric in ("ttft", "tpot", "itl", "e2el"):
        found = {key: value for key, value in result.items() if key.endswith(f"_{metric}_ms") and value is not None}
        texts = [f"{key.removesuffix(f'_{metric}_ms')} {_number(value)}" for key, value in found.items()]
        lines.append(f"{metric + ' (ms)':<26}{', '.join(texts) or '-'}")
    typer.echo("\n".join(lines), err=quiet)
    errors = sorted({error for error in result.get("errors", []) if error})
    for error in errors[:3]:
        typer.echo(f"failed: {error}", err=True)


def _number(value: int | float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2f}"
