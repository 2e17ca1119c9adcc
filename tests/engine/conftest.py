"""Engines over a tiny model. Programs are compiled once; tests make as many engines over them as they like."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest

from atoma_jax import LLM, AsyncLLM, ops
from atoma_jax.config import ModelConfig
from atoma_jax.engine.convert import convert_model
from atoma_jax.engine.engine import Engine
from atoma_jax.engine.pages import PagePool
from atoma_jax.engine.prefix_cache import PrefixCache
from atoma_jax.engine.scheduler import Scheduler
from atoma_jax.native.library import library
from tests.engine.inside import BorrowedRunner, FailingRunner
from tests.engine.tasks import Serve
from tests.tiny_model import write_tiny_llama

SIZES: dict[str, Any] = {
    "dtype": "float32",
    "cpu_precision": "exact" if library() else "default",  # the kernels that users run, without their rounding
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "score_tokens": 16,
    "block_size": 8,
    "num_pages": 28,  # 27 pages for four sequences of up to 12: traffic preempts
}
BUCKETS = {"decode_rows": (1, 4), "prefill_tokens": (16, 32)}


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose greedy answers depend on all of their context, with margins far above rounding."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", embedding_scale=0.35)


@pytest.fixture(scope="session")
def shared_llm(tiny_path: Path) -> LLM:
    """For `llm` and `make_engine`."""
    return LLM(str(tiny_path), **SIZES, **BUCKETS)


@pytest.fixture(scope="session")
def shared_deterministic_llm(tiny_path: Path) -> LLM:
    """For `deterministic_llm` and `make_engine`."""
    return LLM(str(tiny_path), **SIZES, deterministic=True)


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """An idle LLM without cached prefixes, which the test must leave idle, whole and without a compilation."""
    yield from _lent(shared_llm)


@pytest.fixture
def deterministic_llm(shared_deterministic_llm: LLM) -> Iterator[LLM]:
    """The same with deterministic=True."""
    yield from _lent(shared_deterministic_llm)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Q8_0 model and its folder, in this machine's own layout; never changed."""
    folder = tmp_path_factory.mktemp("converted")
    write_tiny_llama(folder / "tiny.gguf", embedding_scale=0.35)
    convert_model(ModelConfig(model=str(folder / "tiny.gguf")), folder / "tiny")
    return folder


@pytest.fixture
def copied(converted: Path, tmp_path: Path) -> Path:
    """A folder to break."""
    return shutil.copytree(converted / "tiny", tmp_path / "tiny")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A folder of float32 to break, that any device reads."""
    write_tiny_llama(tmp_path / "dense.gguf", kind=gguf.GGMLQuantizationType.F32)
    convert_model(ModelConfig(model=str(tmp_path / "dense.gguf"), weight_layout="rows"), tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def make_engine() -> Callable[..., Engine]:
    """A new engine over the device of an LLM: `make_engine(llm, pipelined=False, num_pages=14, policy="priority")`.

    Further arguments are fields of `SchedulerLimits`. Only one engine of a device may have work at a time.
    """

    def make(llm: LLM, *, pipelined: bool = True, num_pages: int | None = None, **limits: Any) -> Engine:
        of = llm.llm_engine
        pool = PagePool(num_pages or of.model_config.num_pages, PrefixCache(of.model_config.page_size))
        scheduler = Scheduler(pool, dataclasses.replace(of._scheduler.limits, **limits))
        return Engine(
            of.tokenizer,
            scheduler,
            of._runner,
            of._sampler,
            of.model_config,
            pipelined=pipelined,
            seed=0,
            default_params=of.default_params,
        )

    return make


@pytest.fixture
def serve(llm: LLM, make_engine: Callable[..., Engine]) -> Iterator[Serve]:
    """`serve(max_waiting=2)`: an AsyncLLM over a new engine; all are shut down at the end of the test."""
    made: list[AsyncLLM] = []

    def build(*, fails_at: int | None = None, **limits: Any) -> AsyncLLM:
        engine = make_engine(llm, **limits)
        device = engine._runner
        engine._runner = (
            BorrowedRunner(device) if fails_at is None else FailingRunner(device, launches=fails_at, at_read=True)
        )
        made.append(AsyncLLM(engine, llm.startup))
        return made[-1]

    yield build
    for served in made:
        served.shutdown()


def _lent(llm: LLM) -> Iterator[LLM]:
    engine = llm.llm_engine
    llm.reset_prefix_cache()
    llm.reset_stats()
    yield llm
    stats = engine.scheduler_stats()
    assert (stats.num_running, stats.num_waiting, stats.pages_owned) == (0, 0, 0)
    engine.step()  # takes in what was still in flight when the last request ended
    assert not engine.has_work
    engine.check_integrity()
    assert stats.pages_free + stats.pages_cached == engine.model_config.num_pages - 1
    assert engine.num_recompilations == 0


@pytest.fixture(params=[False, True], ids=["xla", "native"])
def native_sampling(request: pytest.FixtureRequest) -> bool:
    """Whether native kernels draw."""
    if request.param and not ops.has_native_kernels():  # for lack of a compiler: XLA draws there, and that is tested
        pytest.skip("the native kernels are not built, or do not fit; the log says why")
    return request.param
