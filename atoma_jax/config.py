"""Settings of one engine: frozen sections, checked once, here. Owns every limit of every setting; reads no environment.

The sections mean the same in a TOML file (`[model]`, `[cache]`, …) and as flat keyword arguments
(`EngineConfig.from_options`), whose names are those of other engines where these have one. `None` stands for "the
engine decides from the model and the device" and says so per field.
"""

import dataclasses
import difflib
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from atoma_jax.errors import ConfigError

_NO_MODEL = "must name a model: a configs/models name, a .gguf file, a folder or a hub id"
_TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}

MAX_SEQS = 4096
MAX_TOKENS_A_STEP = 65536
MAX_PROCESSES = 4096
_MESH_AXES = ("data", "fsdp", "tensor", "expert")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model is served, and in which arithmetic."""

    model: str  # a name of configs/models, a .gguf file, a folder, or a hub id
    revision: str | None = None  # of a hub repository
    # Operands of matrix products; sums are float32. auto: bfloat16 where the hardware multiplies it (GPUs, AMX).
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Of dense weights while they load. w8a8: int8 with one scale a row, products with int8 activations.
    quantization: Literal["int8", "int4", "fp8", "ternary", "w8a8"] | None = None
    # Of quantized weights on the device. rows: a byte a code; planar: packed codes of 2, 4 or 8 bits. auto: rows on a
    # CPU, where XLA multiplies them faster, planar elsewhere and for kernels that are interpreted. tiles: what native
    # kernels read, and auto where they run.
    weight_layout: Literal["auto", "rows", "planar", "tiles"] = "auto"
    # pallas: kernels for NVIDIA GPUs; xla: their twins in plain XLA; interpret: the Pallas kernels on any device, slow,
    # for tests; native: compiled C++ for CPUs. auto: pallas on an NVIDIA GPU, native on a CPU where it was compiled,
    # else xla; and xla for who asks for float32, but for native kernels of another cpu_precision than the default.
    # Weights that lie in rows are always multiplied by XLA.
    kernels: Literal["auto", "xla", "pallas", "interpret", "native"] = "auto"
    # Of activations in native products. default: int8 in groups of 32; high: two such planes, about a float's precision
    # and slower; exact: float32, for tests. In front of dense weights default rounds to bfloat16, where these are of
    # that type and the processor multiplies it, and the others do not round.
    cpu_precision: Literal["default", "high", "exact"] = "default"
    max_model_len: int | None = None  # tokens of prompt and output together; None: what the model was trained for
    seed: int = 0  # of requests that bring none
    # pooling: the engine turns prompts into vectors and generates nothing; its programs are others.
    runner: Literal["generate", "pooling"] = "generate"
    pooling_type: Literal["last", "mean"] | None = None  # of the tokens' hidden states; None: that of the last token
    trust_remote_code: bool = False  # refused: code of a checkpoint is never run

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model", self.model, _NO_MODEL)
        _at_least("max_model_len", self.max_model_len, 1)
        if not 0 <= self.seed < 2**63:
            raise ConfigError("seed", self.seed, "must be between 0 and 2**63 - 1")
        if self.pooling_type is not None and self.runner != "pooling":
            raise ConfigError("pooling_type", self.pooling_type, "is for runner = pooling: leave it out")
        if self.trust_remote_code:
            raise ConfigError("trust_remote_code", True, "must be false: code shipped with a checkpoint is never run")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = 16  # tokens of a page
    num_pages: int | None = None  # pages in all, page 0 is scratch; None: from kv_cache_memory_bytes
    kv_cache_memory_bytes: int | None = None  # of a device; None: a share of its memory, see engine/memory.py
    kv_cache_memory_fraction: float | None = None  # the same as a share of what weights leave; --kv-cache-memory 0.5
    gpu_memory_utilization: float | None = None  # share of a GPU's memory for weights, KV and workspace; None: 0.92
    # auto: bfloat16 on a GPU; on a CPU float16 with native kernels of the default cpu_precision, or else float32; see
    # `Backend.kv_dtype`. Those of one byte keep a scale for each token and kv head beside it.
    # Short spellings are taken as well: `_SPELLINGS`.
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8_e4m3", "int8"] = "auto"
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.block_size not in (8, 16, 32, 64, 128):
            raise ConfigError("block_size", self.block_size, "must be 8, 16, 32, 64 or 128 tokens")
        if self.num_pages is not None and self.num_pages < 2:
            raise ConfigError("num_pages", self.num_pages, "must be at least 2: page 0 is scratch")
        _at_least("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1)
        if self.num_pages is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError("num_pages", self.num_pages, "contradicts kv_cache_memory_bytes: give one of the two")
        part = self.kv_cache_memory_fraction
        if part is not None and not 0 < part < 1:
            raise ConfigError("kv_cache_memory_fraction", part, "must be above 0 and below 1")
        for name in ("num_pages", "kv_cache_memory_bytes", "gpu_memory_utilization"):
            if part is not None and getattr(self, name) is not None:
                raise ConfigError("kv_cache_memory_fraction", part, f"contradicts {name}: give one of the two")
        share = self.gpu_memory_utilization
        sized = self.num_pages is not None or self.kv_cache_memory_bytes is not None
        if share is not None and sized:
            raise ConfigError(
                "gpu_memory_utilization", share, "has no effect beside num_pages or kv_cache_memory_bytes: give one"
            )
        if share is not None and not 0 < share <= 1:
            raise ConfigError("gpu_memory_utilization", share, "must be above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What one step may hold, and in which order requests get in."""

    max_num_seqs: int | None = None  # rows of a step; None: 16 on a CPU, 64 elsewhere
    max_num_batched_tokens: int | None = None  # tokens of a step; None: 512 on a CPU, 2048 elsewhere
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    enable_chunked_prefill: bool = True
    async_scheduling: bool = True  # dispatch step N + 1 before the tokens of step N are read
    max_num_queued_reqs: int | None = None  # further requests are refused; None: no bound
    watermark: float = 0.01  # share of the pages that admission leaves free

    def __post_init__(self) -> None:
        _between("max_num_seqs", self.max_num_seqs, 1, MAX_SEQS)
        _between("max_num_batched_tokens", self.max_num_batched_tokens, 1, MAX_TOKENS_A_STEP)
        _at_least("max_num_queued_reqs", self.max_num_queued_reqs, 1)
        if not 0 <= self.watermark < 0.5:
            raise ConfigError("watermark", self.watermark, "must be at least 0 and below 0.5")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileConfig:
    """Which programs are compiled before the engine is ready. Nothing is compiled afterwards."""

    decode_rows: tuple[int, ...] | None = None  # None: rising from 1 to max_num_seqs
    prefill_tokens: tuple[int, ...] | None = None  # None: a quarter of max_num_batched_tokens, and all
    score_tokens: int = 128  # prompt tokens scored in one step for prompt_logprobs
    compile_cache_dir: str | None = None  # programs are kept here for the next start; None: nowhere
    deterministic: bool = False  # one decode bucket, one chunk size: outputs are bit-equal whatever else is served
    enforce_eager: bool = False  # refused: the engine runs compiled programs alone

    def __post_init__(self) -> None:
        for name in ("decode_rows", "prefill_tokens"):
            sizes: tuple[int, ...] | None = getattr(self, name)
            if sizes is not None and (not sizes or min(sizes) < 1 or list(sizes) != sorted(set(sizes))):
                raise ConfigError(name, sizes, "must be a rising list of sizes of at least 1")
            if sizes is not None and self.deterministic and len(sizes) > 1:
                raise ConfigError(name, sizes, "must be one size where deterministic is set: several would round apart")
        _between("score_tokens", self.score_tokens, 1, MAX_TOKENS_A_STEP)
        if self.enforce_eager:
            raise ConfigError("enforce_eager", True, "must be false: the engine runs compiled programs alone")


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationConfig:
    """Limits on what a request may ask for."""

    max_logprobs: int = 20  # entries a position

    def __post_init__(self) -> None:
        _between("max_logprobs", self.max_logprobs, 0, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """How the engine is spread over devices and hosts. Limits of cache and scheduler are of each slice."""

    # fsdp=2,tensor=4; a name of configs/mesh; or a TOML file. None: one device. Read by engine/mesh_config.py.
    mesh: str | None = None
    # Of several hosts, or processes of one: host:port, where process 0 waits for the others. auto: what Slurm, Open MPI
    # or Kubernetes say, or JAX_COORDINATOR_ADDRESS. None: this process alone. Every process runs the same command.
    coordinator_address: str | None = None
    num_processes: int | None = None  # in all; None: as the cluster says
    process_id: int | None = None  # of this one, 0 takes requests; None: as the cluster says

    def __post_init__(self) -> None:
        if self.mesh is not None and not self.mesh.strip():
            raise ConfigError("mesh", self.mesh, "must name sizes such as fsdp=2,tensor=4, or be left out")
        _between("num_processes", self.num_processes, 1, MAX_PROCESSES)
        _at_least("process_id", self.process_id, 0)
        if self.coordinator_address is None:
            for name, value in (("num_processes", self.num_processes), ("process_id", self.process_id)):
                if value is not None:
                    raise ConfigError(name, value, "needs coordinator_address: host:port of process 0, or auto")
            return
        if self.coordinator_address != "auto":
            host, _, port = self.coordinator_address.rpartition(":")
            if not host or not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) < 65536:
                raise ConfigError("coordinator_address", self.coordinator_address, "must be host:port, or auto")
            for name, value in (("num_processes", self.num_processes), ("process_id", self.process_id)):
                if value is None:
                    raise ConfigError(name, value, "must be given beside coordinator_address, unless that is auto")
        if self.num_processes is not None and self.process_id is not None and self.process_id >= self.num_processes:
            raise ConfigError("process_id", self.process_id, f"must be below num_processes = {self.num_processes}")
        if self.mesh is None and self.num_processes != 1:
            raise ConfigError(
                "mesh", None, "must be given for several processes, such as fsdp=-1: how to spread over them"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All settings of an engine."""

    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if self.compile.deterministic and not self.scheduler.enable_chunked_prefill:
            raise ConfigError(
                "enable_chunked_prefill", False, "must be true where deterministic is set: chunks are fixed"
            )
        if self.model.runner == "pooling":
            for name, value, default in (
                ("deterministic", self.compile.deterministic, False),
                ("decode_rows", self.compile.decode_rows, None),
                ("mesh", self.mesh.mesh, None),
            ):
                if value != default:
                    raise ConfigError(name, value, "is for runner = generate: leave it out")

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> "EngineConfig":
        """Builds a configuration from flat options, e.g. `{"model": "m.gguf", "max_num_seqs": 8}`.

        Raises:
            ConfigError: an option is unknown (a near name is offered), of a wrong type, or outside its limits.
        """
        sections: dict[str, dict[str, Any]] = {}
        for name, value in options.items():
            if name not in _SECTION_OF:
                raise ConfigError(name, value, f"is no setting of the engine{_suggestion(name, list(_SECTION_OF))}")
            sections.setdefault(_SECTION_OF[name], {})[name] = value
        return cls.from_sections(sections)

    @classmethod
    def from_toml(cls, path: Path, overrides: dict[str, Any] | None = None) -> "EngineConfig":
        """Reads the sections of a TOML file; flat `overrides` win over the file.

        Raises:
            ConfigError: the file is missing or no TOML, or a section, setting or value is not valid.
        """
        return cls.from_sections(read_toml(path), overrides)

    @classmethod
    def from_sections(cls, sections: dict[str, Any], overrides: dict[str, Any] | None = None) -> "EngineConfig":
        """Builds a configuration from `{"cache": {"block_size": 16}, …}`; flat `overrides` win. Errors as above."""
        sections = {name: dict(values) if isinstance(values, dict) else values for name, values in sections.items()}
        if isinstance(sections.get("mesh"), dict):
            sections["mesh"] = _with_axes(sections["mesh"])
        for name, value in (overrides or {}).items():
            if name not in _SECTION_OF:
                raise ConfigError(name, value, f"is no setting of the engine{_suggestion(name, list(_SECTION_OF))}")
            section = sections.setdefault(_SECTION_OF[name], {})
            if isinstance(section, dict):
                section[name] = value
        built: dict[str, Any] = {}
        for name, values in sections.items():
            if name not in _SECTIONS:
                raise ConfigError(name, values, f"is no section; there are {', '.join(_SECTIONS)}")
            built[name] = build_section(name, _SECTIONS[name], values)
        if "model" not in built:
            raise ConfigError("model", None, _NO_MODEL)
        return cls(**built)

    def sections(self) -> dict[str, dict[str, Any]]:
        """All settings as nested plain values, for printing."""
        return dataclasses.asdict(self)


_SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "compile": CompileConfig,
    "validation": ValidationConfig,
    "mesh": MeshConfig,
}
# What other programs call the same choice: read as the name on the right, so that it has one name everywhere else.
_SPELLINGS: dict[str, dict[str, str]] = {
    "kv_cache_dtype": {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "fp8": "fp8_e4m3"}
}
_SECTION_OF = {option.name: name for name, section in _SECTIONS.items() for option in dataclasses.fields(section)}


def _with_axes(table: dict[str, Any]) -> dict[str, Any]:
    """A [mesh] that names sizes, as files of configs/mesh do, with those as its `mesh`."""
    axes = {name: table[name] for name in _MESH_AXES if name in table}
    if axes and table.get("mesh") is not None:
        raise ConfigError("mesh", table["mesh"], f"contradicts {', '.join(axes)} in [mesh]: give one of the two")
    rest = {name: value for name, value in table.items() if name not in axes}
    return rest | ({"mesh": ",".join(f"{name}={size}" for name, size in axes.items())} if axes else {})


def _suggestion(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}" if near else f"; there are {', '.join(sorted(known))}"


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, unchecked. Raises `ConfigError` where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("config", str(path), f"cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("config", str(path), f"is no valid TOML: {error}") from error


def build_section(section: str, kind: type, values: Any) -> Any:
    """One section's table as its frozen dataclass, every value of the type that the dataclass says.

    Raises:
        ConfigError: it is no table, or a setting is unknown, of a wrong type or outside its limits.
    """
    if not isinstance(values, dict):
        raise ConfigError(section, values, "must be a table of settings")
    hints = get_type_hints(kind)
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"{section}.{name}", value, f"is no setting{_suggestion(name, list(hints))}")
        checked[name] = _checked(name, value, hints[name])
    if section == "model" and "model" not in checked:
        raise ConfigError("model", None, _NO_MODEL)
    return kind(**checked)


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotation `hint` wants it; true and "7" are no numbers."""
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        if isinstance(value, str):
            value = _SPELLINGS.get(name, {}).get(value, value)
        if value not in choices:
            raise ConfigError(name, value, f"must be one of {', '.join(map(str, choices))}")
        return value
    if type(None) in choices:
        return None if value is None else _checked(name, value, choices[0])
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            kind = "integers" if choices[0] is int else "strings"
            raise ConfigError(name, value, f"must be a list of {kind}")
        return tuple(_checked(name, item, choices[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**53 else math.inf
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(name, value, f"must be {_TYPE_NAMES[hint]}")
    return value


def _at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise ConfigError(name, value, f"must be at least {low}")


def _between(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise ConfigError(name, value, f"must be between {low} and {high}")
