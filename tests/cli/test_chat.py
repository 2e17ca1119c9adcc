"""`atoma-jax chat` around a fake engine: history, commands, pipes, Ctrl-C, and the history file of the terminal."""

import os
import pty
import select
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from typer.testing import Result

from atoma_jax import RequestOutputKind, SamplingParams
from atoma_jax.cli.chat import Conversation
from tests.cli.fake_engine import FakeLLM

ROOT = Path(__file__).parents[2]
FAKE_PROGRAM = [sys.executable, "-m", "tests.cli.fake_engine"]
PARAMS = SamplingParams(max_tokens=2, output_kind=RequestOutputKind.DELTA)

Run = Callable[..., Result]


def prompts_of(llm: FakeLLM) -> list[str]:
    return [prompt for prompt, _ in llm.asked]


def test_answers_from_a_pipe_are_all_there_is_on_standard_output(run: Run, fake_llm: type[FakeLLM]) -> None:
    result = run("chat", "--model", "m", "--max-tokens", "2", stdin="one\n\ntwo\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "0 1 \n0 1 \n"
    assert prompts_of(fake_llm.built[0]) == ["<user>one", "<user>one<assistant>0 1 <user>two"]
    assert fake_llm.built[0].is_shut_down


def test_commands(run: Run, fake_llm: type[FakeLLM]) -> None:
    lines = ["one", "/reset", "two", "/system Be brief.", "three", "/system", "four"]
    lines += ["/nonsense", "/help", "/exit", "never asked"]
    result = run("chat", "--model", "m", "--max-tokens", "1", "--system", "First.", stdin="\n".join(lines))
    assert result.exit_code == 0, result.stderr
    assert prompts_of(fake_llm.built[0]) == [
        "<system>First.<user>one",
        "<system>First.<user>two",
        "<system>Be brief.<user>three",
        "<user>four",
    ]
    assert "/nonsense is no command." in result.stderr
    assert result.stderr.count("forget the conversation") == 4  # twice in each of two lists


def test_a_conversation_that_is_too_long_is_told_and_the_program_goes_on(run: Run, fake_llm: type[FakeLLM]) -> None:
    result = run("chat", "--model", "m", "--max-tokens", "1", stdin=f"{'x' * 250}\nshort\n")
    assert result.exit_code == 0
    assert "maximum context length is 200 tokens" in result.stderr
    assert "/reset forgets the conversation" in result.stderr
    assert prompts_of(fake_llm.built[0])[-1] == "<user>short"  # what was refused is not part of it


def test_a_stopped_answer_is_aborted_and_stays_in_the_conversation(
    fake_llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    llm = FakeLLM(None)
    conversation = Conversation(llm, SamplingParams(max_tokens=20, output_kind=RequestOutputKind.DELTA), None)
    before = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    assert conversation.take("slow")
    timer.join()
    said = capsys.readouterr().out.rstrip("\n")
    assert "0 1 " in said
    assert "19" not in said
    assert llm.open_streams == 0  # closed, so the engine was told
    conversation.take("and now")
    assert prompts_of(llm)[-1] == f"<user>slow<assistant>{said}<user>and now"
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_over_a_pipe_stops_the_answer_and_not_the_program() -> None:
    command = [*FAKE_PROGRAM, "chat", "--model", "m", "--max-tokens", "150"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("slow\n")
        process.stdin.flush()
        assert process.stdout.read(4) == "0 1 "
        process.send_signal(signal.SIGINT)
        rest = process.stdout.readline()
        assert "149" not in rest
        answer, messages = process.communicate("quick\n", timeout=60)
    assert process.returncode == 0, messages
    assert "[stopped]" in messages
    assert answer.startswith("0 1 2 ")


@contextmanager
def terminal(home: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The program at a terminal of its own, and the terminal's other end."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "TERM": "dumb"}
    command = [*FAKE_PROGRAM, "chat", "--model", "m", "--max-tokens", "3"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        try:
            yield ours, process
        finally:
            process.kill()
            os.close(ours)


def read_until(descriptor: int, expected: bytes) -> bytes:
    seen = b""
    while expected not in seen:
        assert select.select([descriptor], [], [], 60)[0], f"nothing more came behind {seen!r}"
        seen += os.read(descriptor, 4096)
    return seen


def test_the_terminal_keeps_a_private_history_and_ctrl_d_ends_the_program(tmp_path: Path) -> None:
    with terminal(tmp_path) as (descriptor, process):
        read_until(descriptor, b"> ")
        os.write(descriptor, b"hello there\r")
        read_until(descriptor, b"0 1 2 ")
        for _ in range(300):  # a key pressed before the prompt is back is the terminal's, not the program's
            os.write(descriptor, b"\x04")
            with suppress(subprocess.TimeoutExpired):
                assert process.wait(timeout=0.2) == 0
                break
        assert process.returncode == 0
    history = tmp_path / "state" / "atoma-jax" / "chat_history"
    assert "+hello there" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
