"""Builds an engine from its configuration: finds the model, loads it, compiles every program meanwhile.

Everything is checked from the file's header before anything large is allocated.
"""

import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import jax

from atoma_jax.config import EngineConfig
from atoma_jax.cores import usable_cores
from atoma_jax.engine.admission import SchedulerLimits
from atoma_jax.engine.agreement import facts_of
from atoma_jax.engine.buckets import Buckets, make_buckets
from atoma_jax.engine.cluster import Cluster, join
from atoma_jax.engine.compilations import COMPILATIONS
from atoma_jax.engine.compile_cache import use_compile_cache
from atoma_jax.engine.engine import Engine
from atoma_jax.engine.grammars import has_llguidance
from atoma_jax.engine.host import free_host_bytes, keep_freed_memory
from atoma_jax.engine.limits import EngineLimits
from atoma_jax.engine.memory import (
    DeviceMemory,
    addressable_pages,
    pages_beside,
    plan_pages,
    reserved_workspace,
)
from atoma_jax.engine.mesh_config import resolved_mesh
from atoma_jax.engine.mesh_step import MeshStep
from atoma_jax.engine.model_setup import ModelSetup, served_length, set_up_model, unchecked
from atoma_jax.engine.model_tokenizer import tokenizer_of
from atoma_jax.engine.pages import PagePool
from atoma_jax.engine.prefix_cache import PrefixCache
from atoma_jax.engine.recommended_params import recommended_params
from atoma_jax.engine.runner import Runner
from atoma_jax.engine.sampler_state import SamplerShape
from atoma_jax.engine.scheduler import Scheduler
from atoma_jax.engine.sliced_scheduler import SlicedScheduler
from atoma_jax.engine.step import StepSizes
from atoma_jax.errors import ConfigError
from atoma_jax.loading.content_mark import content_mark
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.model_files import ModelFiles, open_model
from atoma_jax.loading.orbax.checkpoint import OrbaxModel
from atoma_jax.model_spec import KVDtype
from atoma_jax.sampling_params import SamplingParams
from atoma_jax.tokenizer import Tokenizer

CPU_SEQS, CPU_TOKENS, CPU_GROWTH = 16, 512, 16  # few programs: each takes a CPU seconds to compile
GPU_SEQS, GPU_TOKENS, GPU_GROWTH = 64, 2048, 2

OnPhase = Callable[[str, float], None]


@dataclass(slots=True)
class StartupReport:
    """Seconds of each phase, in order. Programs compile while weights load: "compile" is what was left after that."""

    phases: dict[str, float] = field(default_factory=lambda: dict[str, float]())
    kernels: str = ""  # of the programs, once that is decided: native, xla, pallas or interpret
    mesh: str | None = None  # devices along each axis; None: one device
    content: str = ""  # a mark of the model's files; see loading/content_mark.py
    # Bytes of each device, planned from headers and allocated, by what they are for.
    device_bytes: dict[str, tuple[int, int]] = field(default_factory=lambda: dict[str, tuple[int, int]]())
    compile_cache_hits: int = 0
    compile_cache_misses: int = 0

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.phases.values())


class _Phases:
    """Times phases and tells who listens."""

    def __init__(self, on_phase: OnPhase | None):
        self.report = StartupReport()
        self._on_phase = on_phase

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self.report.phases[name] = seconds
        if self._on_phase is not None:
            self._on_phase(name, seconds)


def start_engine(
    config: EngineConfig, *, on_phase: OnPhase | None = None, progress: bool = True
) -> tuple[Engine, StartupReport]:
    """Builds an engine that is ready: nothing compiles afterwards. Of several processes the first one calls this, the
    others `follow`.

    Args:
        config: checked settings.
        on_phase: called with name and seconds as each phase ends.
        progress: show bars on standard error, where that is a terminal, for what is fetched and loaded.

    Raises:
        UserError: the model or a setting cannot be used; see the subclasses.
        DownloadError: the model could not be fetched.
        EngineDeadError: another process of this engine is lost.
    """
    phases = _Phases(on_phase)
    ready = _get_ready(config, phases, progress=progress)
    mesh, limits, runner = ready.setup.backend.mesh, ready.limits, ready.runner
    engine = Engine(
        ready.tokenizer,
        _scheduler(config, ready.plan, limits, slices=1 if mesh is None else mesh.num_slices),
        runner,
        ready.plan.sampler,
        limits,
        pipelined=config.scheduler.async_scheduling,
        seed=config.model.seed,
        default_params=ready.default_params,
    )
    phases.report.mesh = None if mesh is None else mesh.text
    phases.report.device_bytes = {
        "weights": (limits.weight_bytes, runner.device_bytes("weights")),
        "KV cache": (limits.kv_cache_bytes, runner.device_bytes("pages")),
        "workspace": (max(ready.workspace, ready.reserved), ready.workspace),
    }
    return engine, phases.report


def follow(config: EngineConfig, *, on_phase: OnPhase | None = None, progress: bool = True) -> bool:
    """Serves the first of several processes until that one ends. Every process calls this before it starts an engine.

    Args:
        config: checked settings, the same in all processes but for `process_id`.
        on_phase: as in `start_engine`.
        progress: as in `start_engine`.

    Returns:
        False, at once, where this process is the first one or the only one; True when it has served.

    Raises:
        EngineDeadError: another process is lost.
        UserError: as `start_engine` does, like all others.
    """
    if config.mesh.process_id == 0 or join(config.mesh) == 0:
        return False
    ready = _get_ready(config, _Phases(on_phase), progress=progress)
    cluster = ready.cluster
    assert cluster is not None
    try:
        ready.runner.follow()
    except Exception as error:
        cluster.close(f"process {cluster.process} failed: {error}")
        raise
    ready.runner.close()
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    """What every process of an engine has."""

    setup: ModelSetup
    plan: "_Plan"
    limits: EngineLimits
    runner: Runner
    workspace: int  # bytes that programs need of a device
    reserved: int  # bytes that were left to them
    cluster: Cluster | None
    tokenizer: Tokenizer
    default_params: SamplingParams


def _get_ready(config: EngineConfig, phases: _Phases, *, progress: bool) -> _Ready:
    """Finds the model, loads and compiles. Errors as of `start_engine`."""
    hits, misses = COMPILATIONS.cache_hits, COMPILATIONS.cache_misses
    use_compile_cache(config.compile.compile_cache_dir)
    cluster = Cluster.of(config.mesh)
    check = unchecked if cluster is None else cluster.check
    try:
        with phases.phase("resolve"):
            found = resolve(config.model.model, revision=config.model.revision, progress=progress)
        with ExitStack() as stack:
            with phases.phase("header"):
                files = stack.enter_context(open_model(found, max_model_len=config.model.max_model_len))
                setup = _set_up(config, files, cluster)
                phases.report.kernels = setup.backend.kernels
                phases.report.content = content_mark(found.path)
                plan = _plan(config, setup)
                memory = _memory(config, plan, setup, cluster)
                limits = _limits(config, plan, setup, memory)
            with phases.phase("tokenizer"):
                runner = _runner(config, plan, setup, limits, cluster)
                pool = runner.compile(setup.abstract(), threads=plan.threads)
                stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # after an error nothing more compiles
                tokenizer = tokenizer_of(files)
                default_params = recommended_params(files.generation_defaults)
            with phases.phase("restore" if found.kind == "orbax" else "weights"):
                weights = setup.load(threads=plan.threads, progress=progress, check=check)
                jax.block_until_ready(weights)
            with phases.phase("compile"):
                workspace = runner.workspace_bytes()
                fewer = _beside(config, limits, memory, workspace)
                if fewer is not limits:  # programs hold their arguments' shapes
                    limits, runner = fewer, _runner(config, plan, setup, fewer, cluster)
                    pool = runner.compile(setup.abstract(), threads=plan.threads)
                    stack.callback(pool.shutdown, wait=False, cancel_futures=True)
                runner.start(weights)
        if setup.backend.platform == "cpu":
            keep_freed_memory()  # not before: what loading and compiling free is given back
        with phases.phase("warm_up"):
            if cluster is not None:
                cluster.wait_for_all()
            runner.warm_up()
    except Exception as error:
        if cluster is not None:
            cluster.close(f"process {cluster.process} could not start: {error}")
        raise
    phases.report.compile_cache_hits = COMPILATIONS.cache_hits - hits
    phases.report.compile_cache_misses = COMPILATIONS.cache_misses - misses
    return _Ready(
        setup=setup,
        plan=plan,
        limits=limits,
        runner=runner,
        workspace=workspace,
        reserved=reserved_workspace(memory.free, is_cpu=memory.is_cpu),
        cluster=cluster,
        tokenizer=tokenizer,
        default_params=default_params,
    )


def _set_up(config: EngineConfig, files: ModelFiles | OrbaxModel, cluster: Cluster | None) -> ModelSetup:
    """The model on its mesh."""
    devices = jax.devices()
    mesh = resolved_mesh(config.mesh.mesh, len(devices))
    if cluster is not None and (mesh is None or mesh.num_devices != len(devices)):
        problem = f"must use all {len(devices)} devices of the {cluster.count} processes"
        raise ConfigError("mesh", config.mesh.mesh, problem)
    setup = set_up_model(config.model, files, mesh=mesh)
    return setup if mesh is None else replace(setup, devices=mesh.build(devices))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What the configuration comes to on this device, for this model."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    buckets: Buckets
    sampler: SamplerShape
    kv_dtype: KVDtype
    threads: int


def _plan(config: EngineConfig, setup: ModelSetup) -> _Plan:
    spec, is_cpu = setup.spec, setup.backend.platform == "cpu"
    length = served_length(config.model, setup)
    if length < 2:
        raise ConfigError("max_model_len", length, "must be at least 2: a prompt token and an output token")
    seqs = config.scheduler.max_num_seqs or (CPU_SEQS if is_cpu else GPU_SEQS)
    pools = config.model.runner == "pooling"
    tokens = config.scheduler.max_num_batched_tokens or max(seqs, min(CPU_TOKENS if is_cpu else GPU_TOKENS, length))
    if pools:  # prompts are taken whole
        tokens = config.scheduler.max_num_batched_tokens or max(seqs, length)
        if tokens < length:
            raise ConfigError("max_num_batched_tokens", tokens, f"must be at least max_model_len = {length} to pool")
    if tokens < seqs:
        raise ConfigError("max_num_batched_tokens", tokens, f"must be at least max_num_seqs = {seqs}")
    return _Plan(
        max_model_len=length,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        buckets=make_buckets(
            config.compile,
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            growth=CPU_GROWTH if is_cpu else GPU_GROWTH,
            pooling=pools,
        ),
        sampler=SamplerShape(slots=seqs, vocab_size=spec.vocab_size, max_model_len=length),
        kv_dtype=setup.kv_dtype(config.cache),
        threads=usable_cores(),
    )


def _memory(config: EngineConfig, plan: _Plan, setup: ModelSetup, cluster: Cluster | None) -> DeviceMemory:
    """Of each device, the least of all processes."""
    is_cpu = setup.backend.platform == "cpu"
    free = free_host_bytes() if is_cpu else jax.local_devices()[0].memory_stats()["bytes_limit"]
    if is_cpu and setup.devices is not None:
        free //= sum(
            device.process_index == jax.process_index() for device in setup.devices.devices.flat
        )  # one machine
    if cluster is not None:
        free = cluster.agree(facts_of(config, setup, plan.buckets.programs), free)
    return DeviceMemory(is_cpu=is_cpu, free=free, weights=setup.weight_bytes)


def _beside(config: EngineConfig, limits: EngineLimits, memory: DeviceMemory, workspace: int) -> EngineLimits:
    """The same limits, or fewer pages where programs need more than was left to them."""
    page_bytes = limits.kv_cache_bytes // limits.num_pages
    pages = pages_beside(
        config.cache,
        memory,
        limits.num_pages,
        page_bytes=page_bytes,
        workspace=workspace,
        max_model_len=limits.max_model_len,
    )
    return limits if pages == limits.num_pages else replace(limits, num_pages=pages, kv_cache_bytes=pages * page_bytes)


def _limits(config: EngineConfig, plan: _Plan, setup: ModelSetup, memory: DeviceMemory) -> EngineLimits:
    spec, weight_bytes = setup.device_spec, setup.weight_bytes
    page_bytes = spec.kv_bytes_per_token(plan.kv_dtype) * config.cache.block_size  # each slice has pages of its own
    pages = plan_pages(config.cache, memory, page_bytes=page_bytes, max_model_len=plan.max_model_len)
    if setup.backend.kernels == "pallas" and plan.kv_dtype in ("fp8_e4m3", "int8"):
        codes = spec.num_layers * spec.num_kv_heads * spec.head_dim * config.cache.block_size
        pages = addressable_pages(config.cache, pages, page_codes=codes, max_model_len=plan.max_model_len)
    return EngineLimits(
        model=config.model.model,
        max_model_len=plan.max_model_len,
        vocab_size=setup.vocab_size,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_logprobs=config.validation.max_logprobs,
        num_pages=pages,
        page_size=config.cache.block_size,
        kv_cache_bytes=pages * page_bytes,
        weight_bytes=weight_bytes,
        pooling=_pooling(config),
        hidden_size=spec.dim,
    )


def _runner(
    config: EngineConfig, plan: _Plan, setup: ModelSetup, limits: EngineLimits, cluster: Cluster | None
) -> Runner:
    sizes = StepSizes(
        table_width=-(-plan.max_model_len // limits.page_size),
        page_size=limits.page_size,
        max_logprobs=min(limits.max_logprobs, setup.vocab_size),
        fixed_parts=config.compile.deterministic,
        pooling=limits.pooling or "last",
    )
    mesh = setup.backend.mesh
    return Runner(
        setup.graph(),
        setup.spec,
        plan.sampler,
        setup.backend,
        plan.buckets,
        sizes,
        num_pages=limits.num_pages,
        kv_dtype=plan.kv_dtype,
        split_prefill=config.compile.deterministic,
        mesh=None if mesh is None or setup.devices is None else MeshStep(setup.cutting, setup.devices),
        cluster=cluster,
        guided=has_llguidance() and limits.pooling is None,
    )


def _scheduler(config: EngineConfig, plan: _Plan, limits: EngineLimits, *, slices: int) -> Scheduler | SlicedScheduler:
    pools = [PagePool(limits.num_pages, PrefixCache(limits.page_size)) for _ in range(slices)]
    chosen = _scheduler_limits(config, plan, limits)
    return Scheduler(pools[0], chosen) if slices == 1 else SlicedScheduler(pools, chosen)


def _pooling(config: EngineConfig) -> Literal["last", "mean"] | None:
    return None if config.model.runner == "generate" else config.model.pooling_type or "last"


def _scheduler_limits(config: EngineConfig, plan: _Plan, limits: EngineLimits) -> SchedulerLimits:
    chosen, pooling = config.scheduler, limits.pooling
    return SchedulerLimits(
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len + (pooling is not None),  # no room for an output is needed
        policy=chosen.scheduling_policy,
        enable_chunked_prefill=chosen.enable_chunked_prefill and pooling is None,
        enable_prefix_caching=config.cache.enable_prefix_caching and pooling != "mean",  # which takes every token
        watermark=chosen.watermark,
        max_waiting=chosen.max_num_queued_reqs,
        score_chunk=plan.buckets.score.tokens if plan.buckets.score else 1,
        fixed_chunk=limits.max_num_batched_tokens if config.compile.deterministic else None,
    )
