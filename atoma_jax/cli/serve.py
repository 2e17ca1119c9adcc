"""`atoma-jax serve`: an OpenAI-compatible server. Flags, or a TOML file that means the same."""

import dataclasses
import json
from typing import Annotated, Any

import typer

from atoma_jax.cli.common import EngineOptions
from atoma_jax.cli.options import flat_options
from atoma_jax.config import EngineConfig, build_section, read_toml
from atoma_jax.errors import UserError
from atoma_jax.server.settings import DEFAULT_QUEUE, ServerConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServedEngine(EngineOptions):
    """The engine's flags, and those that matter to a server alone. MODEL is an argument."""

    model: Annotated[
        str | None, typer.Argument(help="A name of configs/models, a .gguf file, a folder, or a hub id.")
    ] = None
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Share of a GPU's memory for weights, KV and workspace.")
    ] = None
    runner: Annotated[str | None, typer.Option(help="generate, or pooling: /v1/embeddings and no text.")] = None
    pooling_type: Annotated[str | None, typer.Option(help="Of --runner pooling: last (token) or mean.")] = None
    max_num_queued_reqs: Annotated[
        int | None, typer.Option(help=f"Sequences that may wait; further ones get 429. Default: {DEFAULT_QUEUE}.")
    ] = None
    max_logprobs: Annotated[int | None, typer.Option(help="Logprobs that a request may ask for.")] = None
    enable_chunked_prefill: Annotated[
        bool | None,
        typer.Option("--enable-chunked-prefill/--no-enable-chunked-prefill", help="Spread prompts over steps."),
    ] = None
    async_scheduling: Annotated[
        bool | None,
        typer.Option("--async-scheduling/--no-async-scheduling", help="Dispatch a step before the last one is read."),
    ] = None
    enforce_eager: Annotated[bool | None, typer.Option("--enforce-eager", help="Refused: there is no such mode.")] = (
        None
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Flags of the section [server]. None: not given, so the --config file or the default holds."""

    host: Annotated[str | None, typer.Option(help="Address to listen on; default: this machine alone.")] = None
    port: Annotated[int | None, typer.Option(help="Default: 8000; 0 takes any that is free.")] = None
    uds: Annotated[str | None, typer.Option(help="A Unix socket instead.")] = None
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="ATOMA_JAX_API_KEY", help="Lets in who brings it; may be repeated."),
    ] = None
    api_key_scope: Annotated[
        str | None, typer.Option(help="What keys guard: api (/v1, and what changes the server), or all but the probes.")
    ] = None
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What requests may call the model; may be repeated.")
    ] = None
    chat_template: Annotated[str | None, typer.Option(help="File of a Jinja template, instead of the model's.")] = None
    enable_auto_tool_choice: Annotated[
        bool | None,
        typer.Option(
            "--enable-auto-tool-choice/--no-enable-auto-tool-choice", help="Let models decide whether to call a tool."
        ),
    ] = None
    tool_call_parser: Annotated[
        str | None, typer.Option(help="How the model writes calls: hermes (Hermes, Qwen) or llama3_json.")
    ] = None
    enable_prompt_tokens_details: Annotated[
        bool | None,
        typer.Option("--enable-prompt-tokens-details/--no-prompt-tokens-details", help="Cached tokens in usage."),
    ] = None
    log_requests: Annotated[
        bool | None, typer.Option("--log-requests/--disable-log-requests", help="A line for each request.")
    ] = None
    log_stats: Annotated[
        bool | None, typer.Option("--log-stats/--disable-log-stats", help="A line every ten busy seconds.")
    ] = None
    ui: Annotated[bool | None, typer.Option("--ui/--no-ui", help="Whether there is a page to chat at /.")] = None
    profile_dir: Annotated[str | None, typer.Option(help="Folder for /start_profile.")] = None
    otlp_traces_endpoint: Annotated[
        str | None, typer.Option(help="OpenTelemetry spans go here: http://127.0.0.1:4318/v1/traces.")
    ] = None
    max_body_bytes: Annotated[int | None, typer.Option(help="Of a request.")] = None
    max_header_bytes: Annotated[int | None, typer.Option(help="Of a request's headers.")] = None
    max_messages: Annotated[int | None, typer.Option(help="Of a conversation.")] = None
    max_choices: Annotated[int | None, typer.Option(help="Prompts times n of a request.")] = None
    header_timeout: Annotated[float | None, typer.Option(help="Seconds for a request's headers.")] = None
    keep_alive_timeout: Annotated[float | None, typer.Option(help="Seconds that an idle connection stays open.")] = None
    body_timeout: Annotated[float | None, typer.Option(help="Seconds for a request's body.")] = None
    send_timeout: Annotated[float | None, typer.Option(help="Seconds that a stream may stay unread.")] = None
    queue_timeout: Annotated[float | None, typer.Option(help="Seconds that a request may wait for a step.")] = None
    request_timeout: Annotated[float | None, typer.Option(help="Seconds of a whole request.")] = None
    drain_timeout: Annotated[float | None, typer.Option(help="Seconds for what runs after SIGTERM.")] = None
    stall_timeout: Annotated[float | None, typer.Option(help="Seconds of a step after which /health is 503.")] = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RefusedOptions:
    """Flags of other servers that this one knows and cannot carry out, unless they ask for what is so anyway."""

    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", hidden=True)] = 1
    pipeline_parallel_size: Annotated[int, typer.Option("--pipeline-parallel-size", "-pp", hidden=True)] = 1
    data_parallel_size: Annotated[int, typer.Option("--data-parallel-size", "-dp", hidden=True)] = 1
    enable_expert_parallel: Annotated[bool, typer.Option("--enable-expert-parallel", hidden=True)] = False
    load_format: Annotated[str, typer.Option(hidden=True)] = "auto"
    tokenizer: Annotated[str, typer.Option(hidden=True)] = ""
    speculative_config: Annotated[str, typer.Option(hidden=True)] = ""
    structured_outputs_config: Annotated[str, typer.Option(hidden=True)] = ""
    reasoning_parser: Annotated[str, typer.Option(hidden=True)] = ""
    enable_sleep_mode: Annotated[bool, typer.Option("--enable-sleep-mode", hidden=True)] = False

    def refuse(self) -> None:
        """Raises `UserError` for the first that is not as it is by default."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                raise UserError(field.name, value, _WHY.get(field.name, "is not implemented: leave it out"))


_WHY = {
    "tensor_parallel_size": "must be 1: several devices are asked for by --mesh tensor=N",
    "data_parallel_size": "must be 1: several devices are asked for by --mesh data=N",
    "pipeline_parallel_size": "must be 1: layers are not spread over devices; see --mesh",
    "enable_expert_parallel": "is asked for by --mesh expert=N: leave it out",
    "load_format": "must be auto: the files say what they are",
    "tokenizer": "is the model's own: leave it out",
}


@flat_options
def serve(
    engine: ServedEngine,
    server: ServerOptions,
    refused: RefusedOptions,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings as TOML, without keys, and leave.")
    ] = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's API. --config: a TOML file with the sections that --print-config shows."""
    refused.refuse()
    config, settings = read_settings(engine, server)
    if print_config:
        typer.echo(as_toml(config, settings), nl=False)
        return
    try:
        from atoma_jax.server.run import serve_forever  # the extra, and JAX
    except ModuleNotFoundError as error:
        problem = "needs the extra `server`: pip install 'atoma-jax[server]'"
        raise UserError("serve", error.name, problem) from error
    raise typer.Exit(serve_forever(config, settings))


def read_settings(engine: ServedEngine, server: ServerOptions) -> tuple[EngineConfig, ServerConfig]:
    """The settings of engine and server, checked; flags win over the file.

    Raises:
        ConfigError: a setting is unknown or outside its limits, or two contradict each other.
    """
    tables = {} if engine.config is None else read_toml(engine.config)
    of_server: Any = tables.pop("server", {})
    if isinstance(of_server, dict):
        given = {name: value for name, value in dataclasses.asdict(server).items() if value is not None}
        of_server = of_server | given
    settings = build_section("server", ServerConfig, of_server)
    config = engine.engine_config(tables)
    if config.scheduler.max_num_queued_reqs is None:
        scheduler = dataclasses.replace(config.scheduler, max_num_queued_reqs=DEFAULT_QUEUE)
        config = dataclasses.replace(config, scheduler=scheduler)
    return config, settings


def as_toml(config: EngineConfig, settings: ServerConfig) -> str:
    """All settings as a file that means the same. What is None has no line; keys are left out."""
    lines: list[str] = []
    for name, values in {**config.sections(), "server": dataclasses.asdict(settings)}.items():
        lines.append(f"[{name}]")
        for key, value in values.items():
            if key == "api_key":
                if value:
                    lines.append(f"# api_key: {len(value)} given")
            elif value is not None:
                lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
        lines.append("")
    return "\n".join(lines)
