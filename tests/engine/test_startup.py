"""Building an engine: whatever cannot work is told before anything large is read, allocated or compiled."""

from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import gguf
import jax
import pytest

from atoma_jax import LLM, SamplingParams, UserError
from atoma_jax.config import EngineConfig
from atoma_jax.engine.runner import Runner
from atoma_jax.engine.startup import start_engine
from atoma_jax.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from atoma_jax.native.library import library
from tests.engine.conftest import BUCKETS, SIZES
from tests.tiny_model import write_tiny_llama

Refused = Callable[..., UserError]


@pytest.fixture
def refused(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """The error of starting with some settings; nothing may be compiled or loaded before it."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("it went on")

    monkeypatch.setattr(Runner, "compile", fail)
    monkeypatch.setattr("atoma_jax.engine.model_setup.load_weights", fail)

    def start(model: Path = tiny_path, **options: Any) -> UserError:
        with pytest.raises(UserError) as caught:
            start_engine(EngineConfig.from_options({"model": str(model), **options}))
        return caught.value

    return start


class TestSettingsAgainstTheModel:
    @pytest.mark.parametrize(
        ("options", "field", "value", "rule"),
        [
            ({"max_model_len": 257}, "max_model_len", 257, "must be at most 256, what tiny.gguf was trained for"),
            ({"max_model_len": 1}, "max_model_len", 1, "must be at least 2: a prompt token and an output token"),
            (
                {"max_num_seqs": 8, "max_num_batched_tokens": 4},
                "max_num_batched_tokens",
                4,
                "must be at least max_num_seqs = 8",
            ),
            ({"max_num_seqs": 4, "decode_rows": (1, 2)}, "decode_rows", (1, 2), "must end with max_num_seqs = 4"),
            (
                {"max_num_batched_tokens": 64, "prefill_tokens": (32,)},
                "prefill_tokens",
                (32,),
                "must end with max_num_batched_tokens = 64",
            ),
            ({"num_pages": 16}, "num_pages", 16, "one sequence of max_model_len = 256 tokens needs 17 pages"),
            ({"kv_cache_memory_bytes": 4000}, "kv_cache_memory_bytes", 4000, "there is room for 0"),
            ({"gpu_memory_utilization": 0.5}, "gpu_memory_utilization", 0.5, "there is no GPU"),
            ({"kernels": "pallas"}, "kernels", "pallas", "needs an NVIDIA GPU: on a CPU use xla, or interpret"),
            ({"kernels": "interpret", "dtype": "float32"}, "dtype", "float32", "contradicts --kernels interpret"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, refused: Refused, options: dict[str, Any], field: str, value: Any, rule: str
    ) -> None:
        error = refused(**options)
        assert isinstance(error, ConfigError)
        assert (error.field, error.value) == (field, value)
        assert rule in str(error)

    def test_a_compile_cache_that_cannot_be_made(self, refused: Refused, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        error = refused(compile_cache_dir=str(tmp_path / "file" / "cache"))
        assert error.field == "compile_cache_dir"
        assert "cannot be made: Not a directory" in str(error)

    @pytest.mark.parametrize(("level", "mode"), [("a/cache", 0o777), ("a/cache", 0o1777), ("a", 0o777)])
    def test_a_compile_cache_that_everybody_may_write_to(
        self, refused: Refused, tmp_path: Path, level: str, mode: int
    ) -> None:
        (tmp_path / "a" / "cache").mkdir(parents=True)
        (tmp_path / level).chmod(mode)
        error = refused(compile_cache_dir=str(tmp_path / "a" / "cache"))
        assert (error.field, error.value) == ("compile_cache_dir", str(tmp_path / level))
        assert "chmod o-w" in str(error)

    def test_another_platform(self, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        assert "must be cpu or cuda" in str(refused())


class TestModels:
    def test_a_missing_file(self, refused: Refused, tmp_path: Path) -> None:
        assert isinstance(refused(tmp_path / "absent.gguf"), ModelNotFoundError)

    def test_a_folder_of_another_format(self, refused: Refused, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").touch()
        assert "safetensors" in str(refused(tmp_path))

    def test_a_truncated_file(self, refused: Refused, tiny_path: Path, tmp_path: Path) -> None:
        whole = tiny_path.read_bytes()
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[: len(whole) // 2])
        assert "cut.gguf" in str(refused(cut))

    def test_an_unknown_architecture(self, refused: Refused, tmp_path: Path) -> None:
        error = refused(write_tiny_llama(tmp_path / "m.gguf", architecture="mamba"))
        assert isinstance(error, UnsupportedModelError)
        assert "'mamba'" in str(error)

    def test_an_error_after_the_programs_were_begun_ends_them(
        self, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Programs that wait for a thread are not compiled for nothing."""
        runners: list[Runner] = []
        compile_ = Runner.compile

        def noted(self: Runner, weights: Any, *, threads: int) -> Any:
            runners.append(self)
            return compile_(self, weights, threads=1)

        def fail(metadata: Any, *, source: str) -> None:
            raise UnsupportedModelError("tokenizer", source, "is of a kind that nobody knows")

        monkeypatch.setattr(Runner, "compile", noted)
        monkeypatch.setattr("atoma_jax.engine.model_tokenizer.load_gguf_tokenizer", fail)
        with pytest.raises(UnsupportedModelError):
            start_engine(EngineConfig.from_options({"model": str(tiny_path), **SIZES, **BUCKETS}))
        futures = list(runners[0]._programs.values())
        assert sum(future.cancelled() for future in futures) >= len(futures) - 1
        wait([future for future in futures if not future.cancelled()])  # it would count in the tests that follow


class TestReport:
    def test_a_second_start(self, tiny_path: Path, shared_llm: LLM) -> None:
        """Phases come in order and are told as they end; programs come from the compile cache."""
        told: list[tuple[str, float]] = []
        config = EngineConfig.from_options({"model": str(tiny_path), **SIZES, **BUCKETS})
        engine, report = start_engine(config, on_phase=lambda name, seconds: told.append((name, seconds)))
        assert list(report.phases) == ["resolve", "header", "tokenizer", "weights", "compile", "warm_up"]
        assert dict(told) == report.phases
        assert report.total == pytest.approx(sum(seconds for _, seconds in told))
        assert report.compile_cache_misses == 0
        assert report.kernels == ("native" if library() else "xla")
        assert report.compile_cache_hits >= 5
        assert engine.num_recompilations == 0
        engine.close()

    def test_limits_say_what_was_decided(self, shared_llm: LLM) -> None:
        limits = shared_llm.llm_engine.model_config
        assert (limits.max_model_len, limits.max_num_seqs, limits.max_num_batched_tokens) == (96, 4, 32)
        assert (limits.num_pages, limits.page_size, limits.max_logprobs) == (28, 8, 20)
        L, K, H, bytes_of_float = 2, 2, 16, 4
        assert limits.kv_cache_bytes == 28 * 8 * 2 * L * K * H * bytes_of_float
        state = shared_llm.llm_engine._runner._state
        assert limits.kv_cache_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state.pages))
        weights = jax.tree.leaves(shared_llm.llm_engine._runner._weights)
        assert limits.weight_bytes == sum(leaf.nbytes for leaf in weights)


def test_programs_that_need_more_than_was_left_get_it_from_the_cache(
    tiny_path: Path, shared_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they need is known once they are compiled, and they are compiled for a number of pages: so twice."""
    options: dict[str, Any] = {**SIZES, "decode_rows": (4,), "prefill_tokens": (32,)}
    del options["num_pages"]
    needed = shared_llm.startup.device_bytes["workspace"][1]
    weights = shared_llm.llm_engine.model_config.weight_bytes
    free = weights + 5 * needed // 3  # the cache would take half of what weights leave
    monkeypatch.setattr("atoma_jax.engine.startup.free_host_bytes", lambda: free)
    compiled: list[Runner] = []
    compile_ = Runner.compile

    def noted(self: Runner, abstract: Any, *, threads: int) -> Any:
        compiled.append(self)
        return compile_(self, abstract, threads=threads)

    monkeypatch.setattr(Runner, "compile", noted)
    monkeypatch.setattr("atoma_jax.engine.startup.has_llguidance", lambda: False)  # programs that nobody needs here
    llm = LLM(str(tiny_path), **options)
    limits, bytes_of = llm.llm_engine.model_config, llm.startup.device_bytes
    assert len(compiled) == 2
    assert llm.llm_engine._runner is compiled[1]
    page_bytes = limits.kv_cache_bytes // limits.num_pages
    assert limits.num_pages < (free - weights) // 2 // page_bytes
    assert limits.num_pages == (free - weights - bytes_of["workspace"][1]) // page_bytes
    assert bytes_of["KV cache"] == (limits.kv_cache_bytes, limits.kv_cache_bytes)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts: list[list[int]] = [list(range(3 + 5 * row, 40 + 5 * row)) for row in range(6)]
    mine, want = (one.generate(prompts, params, use_tqdm=False) for one in (llm, shared_llm))
    assert [output.outputs[0].token_ids for output in mine] == [output.outputs[0].token_ids for output in want]
    assert llm.stats().recompilations == 0
    llm.llm_engine.check_integrity()
    llm.shutdown()


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q4_0])
@pytest.mark.slow
def test_other_tensor_types_and_arithmetic_run(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", kind=kind, embedding_scale=0.35)
    options = SIZES | {"dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "decode_rows": (4,), "prefill_tokens": (32,)}
    llm = LLM(str(path), **options)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    outputs = llm.generate([[5, 6, 7], list(range(3, 60))], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [20, 20]
    llm.shutdown()
