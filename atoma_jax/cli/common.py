"""What every command that runs a model shares: the engine's flags, the sampling flags, start-up and its report.

Limits of settings are `config.py`'s and `sampling_params.py`'s; a flag that was not given leaves the decision to them.
"""

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import typer

from atoma_jax.cli.protocol import ChatEngine
from atoma_jax.config import EngineConfig, read_toml
from atoma_jax.errors import ConfigError, UserError
from atoma_jax.sampling_params import RequestOutputKind, SamplingParams

LOWEST_LOGPROB = -9999.0  # stands for -inf, which JSON cannot hold; the same number as in the server's answers


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
AUTO = -1  # a length that the model decides, even where the file names another


def _length(text: str | int) -> int:
    """A number of tokens: 32k is 32,000, 32K is 32,768."""
    digits = str(text).rstrip("kK")
    unit = {"": 1, "k": 1000, "K": 1024}.get(str(text)[len(digits) :])
    if text == "auto":
        return AUTO
    if unit is None or not (digits.isascii() and digits.isdigit()) or len(digits) > 12:
        raise ConfigError("max_model_len", text, "must be a number of tokens, such as 4096, 32k or 32K, or auto")
    return int(digits) * unit


def parse_bytes(field: str, text: str) -> int:
    """A size as people write it: 80GB, 1.5 GiB, 1000000.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    size_in_bytes = 0 if match is None else int(float(match[1]) * _UNITS[match[2] or ""])
    if not 0 < size_in_bytes < 2**60:
        raise UserError(field, text, "must be a size above zero such as 80GB, 24GiB or a number of bytes")
    return size_in_bytes


def _cache_memory(text: str) -> dict[str, Any]:
    """A size, or a share of what weights leave: a number between 0 and 1."""
    try:
        share = float(text)
    except ValueError:
        share = 1.0
    if 0 < share < 1:
        return {"kv_cache_memory_fraction": share}
    return {"kv_cache_memory_bytes": parse_bytes("kv_cache_memory", text)}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Flags that build an engine. None: not given, so the --config file or the engine decides."""

    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A name of configs/models, a .gguf file, a folder, or a hub id."),
    ] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit, for hub ids.")] = None
    config: Annotated[Path | None, typer.Option(help="TOML file of settings; flags win over it.")] = None
    dtype: Annotated[str | None, typer.Option(help="Of matrix products: auto, float32 or bfloat16.")] = None
    quantization: Annotated[
        str | None, typer.Option(help="Of dense weights while they load: int8, int4, fp8, ternary or w8a8.")
    ] = None
    weight_layout: Annotated[
        str | None, typer.Option(help="Of quantized weights: auto, rows (a byte a code), planar or tiles (packed).")
    ] = None
    kernels: Annotated[
        str | None,
        typer.Option(help="auto, native (CPUs), pallas (NVIDIA GPUs), xla, or interpret (pallas anywhere, for tests)."),
    ] = None
    cpu_precision: Annotated[
        str | None, typer.Option(help="Of activations in native kernels: default (int8), high (twice that) or exact.")
    ] = None
    max_model_len: Annotated[
        int | None,
        typer.Option(parser=_length, metavar="TOKENS", help="Prompt and output together; also 32k, 32K or auto."),
    ] = None
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences that one step may hold.")] = None
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens that one step may hold.")] = None
    block_size: Annotated[int | None, typer.Option(help="Tokens of a KV page.")] = None
    mesh: Annotated[
        str | None, typer.Option(help="Spread over devices: fsdp=2,tensor=4, a name of configs/mesh, or a .toml file.")
    ] = None
    coordinator_address: Annotated[
        str | None,
        typer.Option(help="Of several hosts: host:port of process 0, or auto. Run the same command on each of them."),
    ] = None
    num_processes: Annotated[int | None, typer.Option(help="Processes in all, with --coordinator-address.")] = None
    process_id: Annotated[int | None, typer.Option(help="Which of them this is; 0 takes requests.")] = None
    num_pages: Annotated[int | None, typer.Option(help="KV pages in all.")] = None
    kv_cache_memory: Annotated[
        str | None, typer.Option(help="Of the KV cache on a device: 4GB, bytes, or 0.5 of what weights leave.")
    ] = None
    kv_cache_memory_bytes: Annotated[int | None, typer.Option(help="The same as a number alone.")] = None
    kv_cache_dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16, fp8_e4m3 or int8.")] = (
        None
    )
    enable_prefix_caching: Annotated[
        bool | None,
        typer.Option("--enable-prefix-caching/--no-enable-prefix-caching", help="Reuse KV of common prefixes."),
    ] = None
    scheduling_policy: Annotated[str | None, typer.Option(help="fcfs or priority.")] = None
    seed: Annotated[int | None, typer.Option(help="Seed of sampling; the same one gives the same tokens.")] = None
    deterministic: Annotated[
        bool | None,
        typer.Option("--deterministic/--no-deterministic", help="Bit-equal outputs whatever else is served."),
    ] = None
    compile_cache_dir: Annotated[
        Path | None, typer.Option(help="Keeps compiled programs for the next start; default: in the user's cache.")
    ] = None
    compile_cache: Annotated[
        bool, typer.Option("--compile-cache/--no-compile-cache", help="Whether compiled programs are kept.")
    ] = True

    def engine_config(self, tables: dict[str, Any] | None = None) -> EngineConfig:
        """The settings, checked. `tables` are those of the --config file where it was read already.

        Raises:
            ConfigError: a setting is unknown or outside its limits, or two contradict each other.
        """
        if self.compile_cache_dir is not None and not self.compile_cache:
            raise ConfigError("compile_cache_dir", str(self.compile_cache_dir), "contradicts --no-compile-cache")
        given = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items()
            if value is not None and name not in ("config", "compile_cache", "kv_cache_memory")
        }
        if self.kv_cache_memory is not None:
            if self.kv_cache_memory_bytes is not None:
                problem = "contradicts kv_cache_memory_bytes: give one of the two"
                raise ConfigError("kv_cache_memory", self.kv_cache_memory, problem)
            given |= _cache_memory(self.kv_cache_memory)
        if self.max_model_len == AUTO:
            given["max_model_len"] = None
        if self.config is not None and tables is None:
            tables = read_toml(self.config)
        config = EngineConfig.from_sections(tables or {}, given)
        if not self.compile_cache:
            return _with_compile_cache(config, None)
        if config.compile.compile_cache_dir is None:
            return _with_compile_cache(config, str(platformdirs.user_cache_path("atoma-jax") / "programs"))
        return config

    def as_flags(self) -> list[str]:
        """The flags that were given, but for those of the compile cache, as arguments for another process."""
        flags: list[str] = []
        for name, value in dataclasses.asdict(self).items():
            flag = name.replace("_", "-")
            if value is None or name in ("compile_cache", "compile_cache_dir"):
                continue
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                flags += [f"--{flag}", str(value)]
        return flags


# Sampling that a model's makers recommend, and that has a flag.
_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """Flags of one request's sampling; its seed is the engine's --seed. None: not given, so what the model's makers
    recommend holds, and where they say nothing what `SamplingParams` says."""

    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")] = None
    top_k: Annotated[int | None, typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all.")] = None
    min_p: Annotated[float | None, typer.Option(help="Keep tokens this likely relative to the likeliest.")] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 makes tokens of prompt and output less likely.")
    ] = None
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the output; may be repeated.")] = None

    def params(
        self,
        *,
        max_tokens: int | None,
        seed: int | None,
        n: int = 1,
        logprobs: int | None = None,
        output_kind: RequestOutputKind = RequestOutputKind.DELTA,
    ) -> SamplingParams:
        """The settings, checked before there is an engine; arguments as in `SamplingParams`.

        Raises:
            ParameterError: one is outside its limits.
        """
        return SamplingParams(
            **{name: value for name in _RECOMMENDED if (value := getattr(self, name)) is not None},
            n=n,
            seed=seed,
            stop=self.stop,
            max_tokens=max_tokens,
            logprobs=logprobs,
            output_kind=output_kind,
        )

    def completed(self, params: SamplingParams, recommended: SamplingParams) -> SamplingParams:
        """`params` with what the model's makers recommend, but for the flags that were given."""
        open_ = [name for name in _RECOMMENDED if getattr(self, name) is None]
        return dataclasses.replace(params, **{name: getattr(recommended, name) for name in open_})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningEngine:
    """An engine that is ready, and how long that took.

    Attributes:
        llm: the engine.
        phases: seconds by phase of the start, in order, the import of the engine's code first.
    """

    llm: ChatEngine
    phases: dict[str, float]

    @property
    def startup_seconds(self) -> float:
        """Seconds from the first import to readiness."""
        return self.phases["imports"] + self.llm.startup.total

    def startup_json(self) -> dict[str, Any]:
        """The start as keys of a JSON object."""
        return {
            "startup_s": self.startup_seconds,
            "startup_phases_s": self.phases,
            "kernels": self.llm.startup.kernels,
            "compile_cache_hits": self.llm.startup.compile_cache_hits,
            "compile_cache_misses": self.llm.startup.compile_cache_misses,
        }

    def startup_line(self) -> str:
        """The start as a line for people."""
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.phases.items())
        return f"start-up {self.startup_seconds:.2f} s ({phases}), kernels: {self.llm.startup.kernels}"


@contextmanager
def running_engine(config: EngineConfig) -> Generator[RunningEngine]:
    """Builds the engine, says on standard error what it is doing, and shuts it down at the end."""
    started = time.perf_counter()
    from atoma_jax import LLM  # imports JAX: seconds that help and errors of the command line must not wait for

    imports = time.perf_counter() - started
    _report_phase("imports", imports)
    if config.mesh.coordinator_address is not None:
        from atoma_jax import follow

        _keep_standard_output()
        if follow(config, on_phase=_report_phase):
            raise typer.Exit
    llm = LLM.from_config(config, on_phase=_report_phase)
    typer.echo(f"kernels: {llm.startup.kernels}", err=True)
    if llm.startup.mesh is not None:
        typer.echo(f"mesh: {llm.startup.mesh}; on each device:", err=True)
        for part, (planned, allocated) in llm.startup.device_bytes.items():
            typer.echo(f"{part:<12}{allocated:>15,} bytes, {planned:,} planned", err=True)
    try:
        yield RunningEngine(llm=llm, phases={"imports": imports, **llm.startup.phases})
    finally:
        llm.shutdown()


def print_json(value: dict[str, Any]) -> None:
    """Writes the one object that a command with --json prints on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _keep_standard_output() -> None:
    """Leaves it to results: what libraries print there, such as Gloo each connection, goes to standard error."""
    if sys.stdout is sys.__stdout__:
        sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
        os.dup2(2, 1)


def _report_phase(name: str, seconds: float) -> None:
    typer.echo(f"{name.replace('_', ' '):<12}{seconds:7.2f} s", err=True)


def _with_compile_cache(config: EngineConfig, folder: str | None) -> EngineConfig:
    return dataclasses.replace(config, compile=dataclasses.replace(config.compile, compile_cache_dir=folder))
