"""How much memory the KV cache gets, in pages. Arithmetic on sizes; allocates nothing and imports no JAX."""

from dataclasses import dataclass

from atoma_jax.config import CacheConfig
from atoma_jax.errors import ConfigError

CPU_KV_BYTES = 1 << 30  # of a CPU's memory, unless one full context takes more
CPU_KV_SHARE = 0.5  # of a CPU's free memory, at most
GPU_SHARE = 0.92  # of a GPU's memory for weights, KV and workspace
_SIGNED_OFFSETS, _NARROW_OFFSETS = 1 << 31, 1 << 32
WORKSPACE_BYTES = 1 << 30  # of a GPU, for the temporaries of a step
WORKSPACE_SHARE = 8  # of a GPU's memory, one part in so many at most


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Memory of one device, before weights are placed."""

    is_cpu: bool
    free: int  # bytes
    weights: int  # bytes that the model will take


def reserved_workspace(memory: int, *, is_cpu: bool) -> int:
    """Bytes that are left to programs before they are compiled and say what they need; see `pages_beside`."""
    return 0 if is_cpu else min(WORKSPACE_BYTES, memory // WORKSPACE_SHARE)


def plan_pages(config: CacheConfig, memory: DeviceMemory, *, page_bytes: int, max_model_len: int) -> int:
    """Pages of the KV cache, scratch page included.

    Args:
        config: gives the number, the bytes, or neither.
        memory: of the device.
        page_bytes: K and V of one page in all layers, scales included.
        max_model_len: tokens that one sequence may reach; the cache must hold one such sequence.

    Raises:
        ConfigError: one sequence of `max_model_len` does not fit.
    """
    needed = -(-max_model_len // config.block_size) + 1
    if config.num_pages is not None:
        pages, name, given = config.num_pages, "num_pages", config.num_pages
    elif config.kv_cache_memory_bytes is not None:
        name, given = "kv_cache_memory_bytes", config.kv_cache_memory_bytes
        pages = given // page_bytes
    elif config.kv_cache_memory_fraction is not None:
        name, given = "kv_cache_memory_fraction", config.kv_cache_memory_fraction
        reserve = reserved_workspace(memory.free, is_cpu=memory.is_cpu)
        pages = int(max(0, memory.free - memory.weights - reserve) * given) // page_bytes
    else:
        name, given = "max_model_len", max_model_len
        pages = _default_bytes(config, memory, needed * page_bytes) // page_bytes
    if pages < needed:
        tokens = max(0, pages - 1) * config.block_size
        raise ConfigError(
            name,
            given,
            f"one sequence of max_model_len = {max_model_len} tokens needs {needed} pages of {page_bytes} bytes and "
            f"there is room for {pages}; set max_model_len to at most {tokens}, or give the cache "
            f"{needed * page_bytes} bytes by kv_cache_memory_bytes",
        )
    return pages


def pages_beside(
    config: CacheConfig, memory: DeviceMemory, pages: int, *, page_bytes: int, workspace: int, max_model_len: int
) -> int:
    """As many of the planned pages as fit beside weights and what compiled programs turn out to need.

    Args:
        config: where it names the number or the bytes, they stand or fall.
        memory: of the device.
        pages: planned, before programs were compiled.
        page_bytes: of one page.
        workspace: bytes of the largest program's temporaries and results, and of the sampler's state.
        max_model_len: tokens that one sequence may reach.

    Raises:
        ConfigError: what was asked for does not fit, or no sequence of `max_model_len` does.
    """
    share = 1.0 if memory.is_cpu or config.gpu_memory_utilization is None else config.gpu_memory_utilization
    room = int(memory.free * share) - memory.weights - workspace
    if pages * page_bytes <= room:
        return pages
    fitting, needed = max(0, room) // page_bytes, -(-max_model_len // config.block_size) + 1
    taken = (
        f"weights take {memory.weights} and programs {workspace} of the {int(memory.free * share)} bytes of a device"
    )
    for name in ("num_pages", "kv_cache_memory_bytes"):
        given = getattr(config, name)
        if given is not None:
            most = fitting if name == "num_pages" else fitting * page_bytes
            raise ConfigError(name, given, f"must be at most {most}: {taken}")
    if fitting < needed:
        tokens = max(0, fitting - 1) * config.block_size
        problem = f"leaves no room for one sequence: {taken}; set it to at most {tokens}, or spread the model wider"
        raise ConfigError("max_model_len", max_model_len, problem)
    return fitting


def addressable_pages(config: CacheConfig, pages: int, *, page_codes: int, max_model_len: int) -> int:
    """As many of the pages as Pallas kernels reach: Triton counts offsets in 32 signed bits, up to arrays of 4 GiB.

    Args:
        config: where `num_pages` is given, it stands or falls.
        pages: wanted.
        page_codes: of K in one page of all layers, where codes take one byte; wider ones are always within reach.
        max_model_len: tokens that one sequence may reach.

    Raises:
        ConfigError: `num_pages` was given and is beyond, or no sequence of `max_model_len` fits into fewer.
    """
    reached = _SIGNED_OFFSETS // page_codes
    if not _SIGNED_OFFSETS < pages * page_codes <= _NARROW_OFFSETS:
        return pages
    if config.num_pages is not None or reached < -(-max_model_len // config.block_size) + 1:
        raise ConfigError(
            "num_pages",
            pages,
            f"the kernels reach at most {reached} pages of one-byte codes, or at least "
            f"{_NARROW_OFFSETS // page_codes + 1}: set one of those, or kv_cache_dtype to bfloat16",
        )
    return reached


def _default_bytes(config: CacheConfig, memory: DeviceMemory, one_sequence: int) -> int:
    if memory.is_cpu:
        if config.gpu_memory_utilization is not None:
            raise ConfigError(
                "gpu_memory_utilization",
                config.gpu_memory_utilization,
                "there is no GPU: set kv_cache_memory_bytes to size the cache in this machine's memory",
            )
        return min(max(CPU_KV_BYTES, one_sequence), int(max(0, memory.free - memory.weights) * CPU_KV_SHARE))
    share = GPU_SHARE if config.gpu_memory_utilization is None else config.gpu_memory_utilization
    return max(0, int(memory.free * share) - memory.weights - reserved_workspace(memory.free, is_cpu=False))
