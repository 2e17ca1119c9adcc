"""The program as a function, with a fake engine or with a tiny model."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from atoma_jax.cli import app
from tests.cli.fake_engine import FakeLLM, FakePair
from tests.tiny_model import SMALL_ENGINE, write_tiny_llama


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with random weights that starts in seconds."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def small_engine(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags of a small engine; programs are cached as for all tests."""
    settings = tmp_path_factory.mktemp("settings") / "engine.toml"
    settings.write_text(SMALL_ENGINE)
    return "--config", str(settings), "--no-compile-cache"


@pytest.fixture
def run() -> Callable[..., Result]:
    """Runs the program in this process: `run("generate", "--model", "m")`. Output and messages come apart."""

    def invoke(*arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, list(arguments), input=stdin, prog_name="atoma-jax")

    return invoke


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """Puts the fake in place of the engine; `fake_llm.built` lists the engines of this test."""
    monkeypatch.setattr("atoma_jax.LLM", FakeLLM)
    monkeypatch.setattr(FakeLLM, "built", [])
    return FakeLLM


@pytest.fixture
def fake_pair(monkeypatch: pytest.MonkeyPatch) -> type[FakePair]:
    """Puts the fake in place of two models; `fake_pair.built` lists the pairs of this test."""
    monkeypatch.setattr("atoma_jax.ModelPair", FakePair)
    monkeypatch.setattr(FakePair, "built", [])
    return FakePair
