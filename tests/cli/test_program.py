"""Exit codes, messages and start of the program, whatever the command."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import atoma_jax
from tests.cli.fake_engine import FakeLLM

ROOT = Path(__file__).parents[2]
FAKE_PROGRAM = [sys.executable, "-m", "tests.cli.fake_engine"]

Run = Callable[..., Result]


def test_version(run: Run) -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"atoma-jax {atoma_jax.__version__}\n")


@pytest.mark.parametrize("command", ["generate", "chat", "pull", "convert", "quantize", "bench", "eval"])
def test_help_names_every_command(run: Run, command: str) -> None:
    assert f"\n  {command} " in run("--help").stdout
    assert run(command, "--help").exit_code == 0


@pytest.mark.parametrize("arguments", [("generate", "--modle", "m"), ("generat",), ("generate", "--max-tokens", "x")])
def test_usage_errors_end_with_2(run: Run, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr


def test_a_download_that_fails_ends_with_1(run: Run, fake_llm: type[FakeLLM]) -> None:
    result = run("generate", "--model", "unreachable", "--prompt", "x")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: unreachable: no network." in result.stderr


def test_a_dead_engine_ends_with_1_and_is_shut_down(run: Run, fake_llm: type[FakeLLM]) -> None:
    result = run("generate", "--model", "m", "--prompt", "fail")
    assert result.exit_code == 1
    assert "error: A step failed." in result.stderr
    assert fake_llm.built[0].is_shut_down


def test_an_interrupt_ends_with_130(run: Run, fake_llm: type[FakeLLM]) -> None:
    assert run("generate", "--model", "m", "--prompt", "interrupt").exit_code == 130
    assert fake_llm.built[0].is_shut_down


def test_a_fault_of_the_program_is_told_without_a_traceback(run: Run, fake_llm: type[FakeLLM]) -> None:
    result = run("generate", "--model", "m", "--prompt", "broken")
    assert result.exit_code == 1
    assert "error: RuntimeError: no such thing" in result.stderr
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("prompt", "kind"), [("broken", RuntimeError), ("fail", atoma_jax.EngineDeadError)])
def test_debug_shows_where_it_happened(run: Run, fake_llm: type[FakeLLM], prompt: str, kind: type[Exception]) -> None:
    assert isinstance(run("--debug", "generate", "--model", "m", "--prompt", prompt).exception, kind)


def test_a_reader_that_goes_away_is_no_error_to_talk_about() -> None:
    command = [*FAKE_PROGRAM, "generate", "--model", "m", "--prompt", "slow", "--max-tokens", "100"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == "0"
        process.stdout.close()
        messages = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in messages
    assert "error" not in messages.lower()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["quantize", "--help"], ["bench", "throughput", "--help"]]
)
def test_help_does_not_wait_for_jax(arguments: list[str]) -> None:
    code = (
        "import sys; from atoma_jax.cli import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        "assert not {'jax', 'flax'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
