"""The engine's flags: what reaches the configuration, in which order, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import platformdirs
import pytest
from typer.testing import Result

from atoma_jax.cli.common import EngineOptions
from atoma_jax.errors import ConfigError
from tests.cli.fake_engine import FakeLLM

Run = Callable[..., Result]


def test_flags_reach_the_engine(run: Run, fake_llm: type[FakeLLM]) -> None:
    result = run(
        *("generate", "--model", "m", "--prompt", "x", "--dtype", "bfloat16", "--max-model-len", "64"),
        *("--max-num-seqs", "3", "--max-num-batched-tokens", "32", "--block-size", "8", "--num-pages", "9"),
        *("--kv-cache-dtype", "float16", "--no-enable-prefix-caching", "--scheduling-policy", "priority"),
        *("--seed", "5", "--deterministic", "--compile-cache-dir", "programs", "--revision", "main"),
        *("--kernels", "interpret"),
    )
    assert result.exit_code == 0, result.stderr
    config = fake_llm.built[0].config
    assert (config.model.model, config.model.revision, config.model.dtype) == ("m", "main", "bfloat16")
    assert (config.model.max_model_len, config.model.seed, config.model.kernels) == (64, 5, "interpret")
    assert (config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens) == (3, 32)
    assert config.scheduler.scheduling_policy == "priority"
    assert (config.cache.block_size, config.cache.num_pages, config.cache.kv_cache_dtype) == (8, 9, "float16")
    assert config.cache.enable_prefix_caching is False
    assert (config.compile.deterministic, config.compile.compile_cache_dir) == (True, "programs")


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text('[model]\nmodel = "a"\n[scheduler]\nmax_num_seqs = 4\n[compile]\ncompile_cache_dir = "there"\n')
    config = EngineOptions(config=file, model="b").engine_config()
    assert (config.model.model, config.scheduler.max_num_seqs) == ("b", 4)
    assert config.compile.compile_cache_dir == "there"
    assert EngineOptions(config=file).engine_config().model.model == "a"
    assert EngineOptions(config=file, compile_cache=False).engine_config().compile.compile_cache_dir is None


def test_compiled_programs_are_kept_in_the_users_cache_unless_told_otherwise() -> None:
    kept = EngineOptions(model="m").engine_config().compile.compile_cache_dir
    assert kept == str(platformdirs.user_cache_path("atoma-jax") / "programs")
    assert EngineOptions(model="m", compile_cache=False).engine_config().compile.compile_cache_dir is None
    with pytest.raises(ConfigError, match="contradicts --no-compile-cache"):
        EngineOptions(model="m", compile_cache=False, compile_cache_dir=Path("x")).engine_config()


def test_flags_for_another_process_are_those_given() -> None:
    options = EngineOptions(
        model="m", max_num_seqs=2, enable_prefix_caching=False, deterministic=True, config=Path("c")
    )
    assert options.as_flags() == [
        *("--model", "m", "--config", "c", "--max-num-seqs", "2", "--no-enable-prefix-caching", "--deterministic")
    ]
    assert EngineOptions(model="m", compile_cache_dir=Path("x"), compile_cache=True).as_flags() == ["--model", "m"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "model: must name a model"),
        (("--model", "m", "--block-size", "7"), "block_size: must be 8, 16, 32, 64 or 128 tokens, got 7"),
        (("--model", "m", "--dtype", "int3"), "dtype: must be one of auto, float32, bfloat16, got 'int3'"),
        (("--model", "m", "--max-num-seqs", "0"), "max_num_seqs: must be between 1 and"),
        (("--model", "m", "--num-pages", "4", "--kv-cache-memory-bytes", "9"), "num_pages: contradicts"),
        (("--model", "m", "--kv-cache-memory", "much"), "kv_cache_memory: must be a size above zero"),
        (("--model", "m", "--kv-cache-memory", "1GB", "--kv-cache-memory-bytes", "9"), "kv_cache_memory: contradicts"),
        (("--model", "m", "--kv-cache-memory", "0.5", "--num-pages", "9"), "kv_cache_memory_fraction: contradicts"),
        (("--model", "m", "--config", "absent.toml"), "config: cannot be read: No such file"),
    ],
)
def test_settings_that_cannot_be_end_with_2_before_an_engine_is_built(
    run: Run, fake_llm: type[FakeLLM], flags: tuple[str, ...], message: str
) -> None:
    result = run("generate", "--prompt", "x", *flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert not fake_llm.built


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("4GB", "kv_cache_memory_bytes", 4 * 10**9),
        ("1.5 GiB", "kv_cache_memory_bytes", 3 << 29),
        ("4096", "kv_cache_memory_bytes", 4096),
        ("0.5", "kv_cache_memory_fraction", 0.5),
    ],
)
def test_memory_of_the_cache_is_a_size_or_a_share(text: str, name: str, value: float) -> None:
    config = EngineOptions(model="m", kv_cache_memory=text).engine_config()
    assert getattr(config.cache, name) == value
