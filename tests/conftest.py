"""What all tests share: the platform, checked shapes, a compile cache, hypothesis profiles and the real models."""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything imports JAX: the suite is for the CPU wherever it runs, so that its numbers are the same everywhere.
os.environ["JAX_PLATFORMS"] = "cpu"

import beartype.claw
import hypothesis
import jaxtyping
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("atoma_jax", "pallas_kernels", "sharding")


def _check_types() -> None:
    """Checks every annotation of a call while tests run: shapes and dtypes where a module has any, types elsewhere.

    The two are apart because binding the letters of shapes costs more than most calls do.
    """
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    # Beartype alone does not pass over names that only a type checker imports.
    shaped = [path for path in sources if re.search("jaxtyping|TYPE_CHECKING", path.read_text(encoding="utf-8"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in shaped]
    # `atoma_jax` would stand for all below it; it holds no code.
    names = [name for name in names if name not in PACKAGES]
    beartype.claw.beartype_packages(PACKAGES, conf=beartype.BeartypeConf(claw_is_pep526=False))
    jaxtyping.install_import_hook(names, "beartype.beartype")


_check_types()  # before anything of ours is imported

hypothesis.settings.register_profile("dev", deadline=None)  # a first example may compile for seconds
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")

_COMPILE_CACHE_BYTES = 2 << 30


def pytest_configure(config: pytest.Config) -> None:
    """Shares compiled programs between tests, workers and runs: in `.pytest_cache`, dropped by `--cache-clear`."""
    import jax
    from jax._src import compiler
    from jax._src.lru_cache import LRUCache

    # Simulated ones, for meshes; whoever asks for none gets the first.
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # A limit also makes JAX lock the folder, without which a second worker may read a program that is half written. But
    # to keep to it, JAX looks at every program there before it writes one: a fifth of a second each once there are two
    # thousand. Nothing comes near the limit.
    jax.config.update("jax_compilation_cache_max_size", _COMPILE_CACHE_BYTES)
    assert hasattr(LRUCache, "_evict_if_needed"), "JAX has renamed what bounds its cache"
    LRUCache._evict_if_needed = lambda *_, **__: None
    if jax.__version_info__ < (0, 11):  # later ones have no other emitter
        compiler.get_compile_options = _with_the_quick_emitter(compiler.get_compile_options)


def _with_the_quick_emitter(get: Callable[..., Any]) -> Callable[..., Any]:
    """Where optimizations are off, XLA writes loops by its older emitter, which takes a fifth less time to compile."""

    @functools.wraps(get)
    def get_compile_options(*args: Any, **kwargs: Any) -> Any:
        options = get(*args, **kwargs)
        if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1":
            options.env_option_overrides = [*options.env_option_overrides, ("xla_cpu_use_fusion_emitters", False)]
        return options

    return get_compile_options


@pytest.hookimpl(tryfirst=True)  # before fixtures, whose programs it is about
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Small models run a few steps only: what LLVM takes to optimize their programs is not worth it. The arithmetic is
    the same but for the order of some sums. Real models, and tests marked `optimized`, run programs as users do."""
    import jax

    optimized = any(item.get_closest_marker(name) for name in ("optimized", "model"))
    jax.config.update("jax_disable_most_optimizations", not optimized)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(not optimized))  # of processes that a test starts


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, Q4_1: what `atoma-jax pull smollm2-135m-instruct` brings."""
    return pulled("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M, Q4_K_M: what `atoma-jax pull gemma3-270m` brings."""
    return pulled("gemma3-270m")


def pulled(name: str) -> Path:
    """A model known by name; the test is skipped where it cannot be fetched, with that reason."""
    from atoma_jax.errors import DownloadError
    from atoma_jax.loading.fetch.hub import resolve

    try:
        return resolve(name, progress=False).path
    except DownloadError as error:
        pytest.skip(str(error))
