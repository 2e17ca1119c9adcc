"""Flags and files of `atoma-jax serve`: they mean the same, and each works or is refused by name."""

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from atoma_jax.cli import app
from atoma_jax.cli.serve import DEFAULT_QUEUE, ServedEngine, ServerOptions, as_toml, read_settings
from atoma_jax.config import EngineConfig
from atoma_jax.errors import ConfigError
from atoma_jax.server.settings import ServerConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "serve").glob("*.toml"))

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    def invoke(*arguments: str, env: dict[str, str] | None = None) -> Result:
        return CliRunner().invoke(app, ["serve", *arguments], prog_name="atoma-jax", env=env)

    return invoke


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, ServerConfig]]:
    """What a server would be started with."""
    from atoma_jax.server import run as running

    started: list[tuple[EngineConfig, ServerConfig]] = []

    def serve_forever(config: EngineConfig, settings: ServerConfig) -> int:
        started.append((config, settings))
        return 0

    monkeypatch.setattr(running, "serve_forever", serve_forever)
    return started


def test_flags_reach_the_server(run: Run, served: list[tuple[EngineConfig, ServerConfig]]) -> None:
    result = run(
        *("m", "--host", "0.0.0.0", "--port", "9", "--api-key", "a", "--api-key", "b", "--served-model-name", "x"),
        *("--max-model-len", "32K", "--max-num-queued-reqs", "7", "--max-logprobs", "3", "--queue-timeout", "2"),
        *("--no-enable-chunked-prefill", "--no-async-scheduling", "--gpu-memory-utilization", "0.5"),
        *("--disable-log-requests", "--disable-log-stats", "--no-prompt-tokens-details", "--kv-cache-dtype", "fp8"),
        *("-tp", "1", "--load-format", "auto"),
    )
    assert result.exit_code == 0, result.stderr
    ((config, settings),) = served
    assert (config.model.model, config.model.max_model_len, config.validation.max_logprobs) == ("m", 32768, 3)
    assert config.scheduler.max_num_queued_reqs == 7
    assert not config.scheduler.enable_chunked_prefill
    assert not config.scheduler.async_scheduling
    assert config.cache.gpu_memory_utilization == 0.5
    assert config.cache.kv_cache_dtype == "fp8_e4m3"
    assert settings == ServerConfig(
        host="0.0.0.0",
        port=9,
        api_key=("a", "b"),
        served_model_name=("x",),
        queue_timeout=2.0,
        log_requests=False,
        log_stats=False,
        enable_prompt_tokens_details=False,
    )


def test_by_default_it_listens_to_this_machine_alone_and_its_queue_is_bounded(
    run: Run, served: list[tuple[EngineConfig, ServerConfig]]
) -> None:
    assert run("m").exit_code == 0
    ((config, settings),) = served
    assert (settings.host, settings.port, settings.api_key) == ("127.0.0.1", 8000, ())
    assert config.scheduler.max_num_queued_reqs == DEFAULT_QUEUE


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *(((f"--{name}", "2"), f"{name.replace('-', '_')}: must be 1") for name in ("tensor-parallel-size",)),
        (("-pp", "2"), "pipeline_parallel_size: must be 1"),
        (("-dp", "2"), "data_parallel_size: must be 1"),
        (("--enable-expert-parallel",), "enable_expert_parallel: is asked for by --mesh"),
        (("--load-format", "dummy"), "load_format: must be auto"),
        (("--tokenizer", "x"), "tokenizer: is the model's own"),
        (("--speculative-config", "{}"), "speculative_config: is not implemented"),
        (("--structured-outputs-config", "{}"), "structured_outputs_config: is not implemented"),
        (("--enable-auto-tool-choice",), "enable_auto_tool_choice: needs tool_call_parser"),
        (("--tool-call-parser", "mistral"), "tool_call_parser: must be one of hermes, llama3_json"),
        (("--reasoning-parser", "x"), "reasoning_parser: is not implemented"),
        (("--enable-sleep-mode",), "enable_sleep_mode: is not implemented"),
        (("--enforce-eager",), "enforce_eager: must be false"),
        (("--port", "70000"), "port: must be between 0 and 65535"),
        (("--uds", "/tmp/x", "--port", "9"), "uds: contradicts host and port"),
        (("--api-key", "a b"), "api_key: must be of visible ASCII"),
        (("--api-key-scope", "all"), "api_key_scope: needs api_key"),
        (("--api-key-scope", "some", "--api-key", "a"), "api_key_scope: must be"),
        (("--queue-timeout", "0"), "queue_timeout: must be above 0"),
        (("--queue-timeout", "nan"), "queue_timeout: must be above 0"),
        (("--max-header-bytes", "1"), "max_header_bytes: must be between"),
        (("--max-choices", "0"), "max_choices: must be at least 1"),
        (("--served-model-name", "a\nb"), "served_model_name: must have"),
        (("--max-model-len", "many"), "max_model_len: must be"),
        (("--chat-template", "absent.jinja"), "chat_template: cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_by_name(run: Run, flags: tuple[str, ...], message: str) -> None:
    result = run("m", *flags)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_a_key_is_shown_nowhere(run: Run) -> None:
    result = run("m", "--print-config", env={"ATOMA_JAX_API_KEY": "hidden-one hidden-two"})
    assert result.exit_code == 0
    assert "# api_key: 2 given" in result.stdout
    assert "hidden" not in result.stdout
    assert "hidden" not in repr(ServerConfig(api_key=("hidden",)))


def test_what_is_printed_means_the_same(run: Run, tmp_path: Path) -> None:
    flags = ("m", "--port", "9", "--max-num-seqs", "3", "--served-model-name", 'a "name"', "--queue-timeout", "2.5")
    printed = run(*flags, "--print-config").stdout
    file = tmp_path / "serve.toml"
    file.write_text(printed)
    config, settings = read_settings(ServedEngine(config=file), ServerOptions())
    assert as_toml(config, settings) == printed
    assert settings.served_model_name == ('a "name"',)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('[model]\nmodel = "a"\nmax_model_len = 64\n[server]\nport = 9\nhost = "::1"\n')
    config, settings = read_settings(ServedEngine(config=file, max_model_len=-1), ServerOptions(port=10))
    assert (config.model.model, config.model.max_model_len) == ("a", None)
    assert (settings.host, settings.port) == ("::1", 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprot = 9", "server.prot: is no setting; did you mean port"),
        ("[server]\nport = true", "port: must be an integer"),
        ("[server]\napi_key = [5]", "api_key: must be"),
        ("server = 5", "server: must be a table"),
        ("[mesh]\ntensor = 2\nmesh = 'fsdp=2'", "mesh: contradicts tensor in [mesh]"),
        ("[meshes]\ntensor = 2", "meshes: is no section"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_settings(ServedEngine(model="m", config=file), ServerOptions())
    assert message in str(refused.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_files_that_are_shipped_are_valid(path: Path) -> None:
    tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    _, settings = read_settings(ServedEngine(config=path), ServerOptions())
    assert settings != ServerConfig() or tables["server"]["port"] == 8000


def test_other_commands_do_not_wait_for_it() -> None:
    import subprocess

    code = "import sys, atoma_jax.cli; print(sorted({'fastapi', 'uvicorn', 'starlette', 'jax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
