"""Pages for the KV cache: what was asked for, or a share of the memory; one whole sequence always fits."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from atoma_jax.config import CacheConfig
from atoma_jax.engine.host import free_host_bytes
from atoma_jax.engine.memory import (
    CPU_KV_BYTES,
    WORKSPACE_BYTES,
    DeviceMemory,
    addressable_pages,
    pages_beside,
    plan_pages,
    reserved_workspace,
)
from atoma_jax.errors import ConfigError

GIB = 1 << 30
PAGE = 1 << 20  # bytes


def pages(config: CacheConfig, memory: DeviceMemory, max_model_len: int = 1000) -> int:
    return plan_pages(config, memory, page_bytes=PAGE, max_model_len=max_model_len)


def cpu(free: int = 64 * GIB, weights: int = GIB) -> DeviceMemory:
    return DeviceMemory(is_cpu=True, free=free, weights=weights)


def gpu(free: int = 80 * GIB, weights: int = GIB) -> DeviceMemory:
    return DeviceMemory(is_cpu=False, free=free, weights=weights)


def test_a_number_of_pages_is_taken_as_it_is() -> None:
    assert pages(CacheConfig(num_pages=64), cpu()) == 64


def test_bytes_become_whole_pages() -> None:
    assert pages(CacheConfig(kv_cache_memory_bytes=100 * PAGE + PAGE - 1), cpu()) == 100


@pytest.mark.parametrize(("memory", "left"), [(cpu(64 * GIB, 4 * GIB), 60), (gpu(80 * GIB, 9 * GIB), 70)])
def test_a_share_is_one_of_what_weights_and_workspace_leave(memory: DeviceMemory, left: int) -> None:
    config = CacheConfig(kv_cache_memory_fraction=0.25)
    assert pages(config, memory) == left * GIB // 4 // PAGE
    with pytest.raises(ConfigError, match="kv_cache_memory_fraction"):
        pages(config, cpu(2 * GIB, 2 * GIB))


def test_a_cpu_gives_a_fixed_amount() -> None:
    assert pages(CacheConfig(), cpu()) == CPU_KV_BYTES // PAGE


def test_a_cpu_gives_more_where_one_sequence_takes_more() -> None:
    assert pages(CacheConfig(), cpu(), max_model_len=16 * 5000) == 5001


def test_a_cpu_gives_at_most_half_of_what_the_weights_leave() -> None:
    assert pages(CacheConfig(), cpu(free=GIB + GIB // 2, weights=GIB)) == 256


def test_a_gpu_gives_what_weights_and_workspace_leave_of_its_share() -> None:
    wanted = int(80 * GIB * 0.92) - 5 * GIB - WORKSPACE_BYTES
    assert pages(CacheConfig(), gpu(weights=5 * GIB)) == wanted // PAGE
    half = 40 * GIB - 5 * GIB - WORKSPACE_BYTES
    assert pages(CacheConfig(gpu_memory_utilization=0.5), gpu(weights=5 * GIB)) == half // PAGE


@pytest.mark.parametrize(
    ("config", "memory", "field", "value", "room"),
    [
        (CacheConfig(num_pages=63), cpu(), "num_pages", 63, 63),
        (CacheConfig(kv_cache_memory_bytes=10 * PAGE), cpu(), "kv_cache_memory_bytes", 10 * PAGE, 10),
        (CacheConfig(kv_cache_memory_bytes=1), cpu(), "kv_cache_memory_bytes", 1, 0),
        (CacheConfig(), cpu(free=GIB, weights=GIB), "max_model_len", 1000, 0),
        (CacheConfig(), gpu(weights=79 * GIB), "max_model_len", 1000, 0),
    ],
)
def test_where_one_sequence_does_not_fit_the_error_says_what_would(
    config: CacheConfig, memory: DeviceMemory, field: str, value: int, room: int
) -> None:
    with pytest.raises(ConfigError) as caught:
        pages(config, memory)
    assert (caught.value.field, caught.value.value) == (field, value)
    message = str(caught.value)
    assert f"max_model_len = 1000 tokens needs 64 pages of {PAGE} bytes" in message
    assert f"there is room for {room}" in message
    assert f"set max_model_len to at most {max(0, room - 1) * 16}" in message
    assert f"{64 * PAGE} bytes by kv_cache_memory_bytes" in message


def test_a_share_of_a_gpu_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="there is no GPU: set kv_cache_memory_bytes") as caught:
        pages(CacheConfig(gpu_memory_utilization=0.5), cpu())
    assert caught.value.field == "gpu_memory_utilization"


@pytest.mark.parametrize(("wanted", "got"), [(2048, 2048), (2049, 2048), (4096, 2048), (4097, 4097)])
def test_no_cache_of_one_byte_codes_is_of_a_size_that_kernels_reach_in_part(wanted: int, got: int) -> None:
    """Of 2 GiB of K and less, and of more than 4 GiB, every code is reached."""
    assert addressable_pages(CacheConfig(), wanted, page_codes=1 << 20, max_model_len=1000) == got


@pytest.mark.parametrize(("config", "length"), [(CacheConfig(num_pages=3000), 1000), (CacheConfig(), 16 * 2048)])
def test_pages_that_kernels_do_not_reach_are_refused_where_they_must_be_so_many(
    config: CacheConfig, length: int
) -> None:
    with pytest.raises(
        ConfigError, match=r"at most 2048 pages.*or at least 4097.*kv_cache_dtype to bfloat16"
    ) as caught:
        addressable_pages(config, 3000, page_codes=1 << 20, max_model_len=length)
    assert (caught.value.field, caught.value.value) == ("num_pages", 3000)


def test_free_memory_counts_page_cache_as_free() -> None:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    info = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    assert 0 < free_host_bytes() <= info["MemTotal"]
    assert abs(free_host_bytes() - info["MemAvailable"]) < info["MemTotal"] // 2


_FAULTS = """
import ctypes, resource
from atoma_jax.engine.host import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def touch():
    place = libc.malloc(ctypes.c_size_t(64 << 20))
    ctypes.memset(place, 1, 64 << 20)
    libc.free(ctypes.c_void_p(place))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    touch()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touch()
anew = faults()
keep_freed_memory()
touch()
print(anew, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory as they please")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """In a process of its own, as the setting stays. By page faults: the system maps what was given back again."""
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    anew, kept = map(int, done.stdout.split())
    assert anew > 10 * max(kept, 1), (anew, kept)


class TestBesidePrograms:
    """Programs say what they need once they are compiled; the cache gets what is left."""

    def beside(self, config: CacheConfig, memory: DeviceMemory, workspace: int, planned: int = 100) -> int:
        return pages_beside(config, memory, planned, page_bytes=PAGE, workspace=workspace, max_model_len=160)

    def test_nothing_changes_where_all_fits(self) -> None:
        assert self.beside(CacheConfig(), gpu(free=200 * PAGE, weights=50 * PAGE), 50 * PAGE) == 100

    def test_pages_make_room(self) -> None:
        memory = gpu(free=200 * PAGE, weights=50 * PAGE)
        assert self.beside(CacheConfig(), memory, 70 * PAGE + 1) == 79
        assert self.beside(CacheConfig(gpu_memory_utilization=0.75), memory, 70 * PAGE) == 30
        assert self.beside(CacheConfig(), cpu(free=200 * PAGE, weights=50 * PAGE), 80 * PAGE) == 70

    def test_what_was_asked_for_is_refused_rather_than_cut(self) -> None:
        memory = gpu(free=200 * PAGE, weights=50 * PAGE)
        with pytest.raises(ConfigError, match=r"must be at most 80: weights take .* and programs .* of the") as caught:
            self.beside(CacheConfig(num_pages=100), memory, 70 * PAGE)
        assert caught.value.field == "num_pages"
        with pytest.raises(ConfigError, match=f"must be at most {80 * PAGE}") as caught:
            self.beside(CacheConfig(kv_cache_memory_bytes=100 * PAGE), memory, 70 * PAGE)
        assert caught.value.field == "kv_cache_memory_bytes"

    def test_one_sequence_must_fit(self) -> None:
        memory = gpu(free=200 * PAGE, weights=50 * PAGE)
        assert self.beside(CacheConfig(), memory, 139 * PAGE) == 11  # 160 tokens, and the scratch page
        with pytest.raises(ConfigError, match=r"leaves no room for one sequence.*at most 144, or spread") as caught:
            self.beside(CacheConfig(), memory, 140 * PAGE)
        assert caught.value.field == "max_model_len"

    def test_a_small_device_reserves_less(self) -> None:
        assert reserved_workspace(80 * GIB, is_cpu=False) == WORKSPACE_BYTES
        assert reserved_workspace(2 * GIB, is_cpu=False) == GIB // 4
        assert reserved_workspace(80 * GIB, is_cpu=True) == 0
