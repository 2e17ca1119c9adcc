"""`atoma-jax chat`: a conversation at the terminal, or line by line from a pipe.

Ctrl-C stops an answer, not the program; Ctrl-D ends it. Answers go to standard output, all else to standard error.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import platformdirs
import typer

from atoma_jax.cli.common import EngineOptions, SamplingOptions, running_engine
from atoma_jax.cli.options import flat_options
from atoma_jax.cli.protocol import ChatEngine
from atoma_jax.errors import UserError
from atoma_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from prompt_toolkit.history import History

HELP = """/reset          forget the conversation
/system [TEXT]  set the system message (without TEXT: none) and forget the conversation
/help           show this
/exit           leave, as Ctrl-D does
Ctrl-C          stop the answer"""

_log = logging.getLogger(__name__)


@flat_options
def chat(
    engine: EngineOptions,
    sampling: SamplingOptions,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one answer; default: as many as the model's length leaves.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
) -> None:
    """Talk with a model. /help lists what else can be typed."""
    params = sampling.params(max_tokens=max_tokens, seed=engine.seed)
    config = engine.engine_config()
    read_line = _terminal_reader() if sys.stdin.isatty() else _pipe_reader
    with running_engine(config) as running:
        typer.echo(f"{running.startup_line()}\n/help lists commands", err=True)
        params = sampling.completed(params, running.llm.get_default_sampling_params())
        conversation = Conversation(running.llm, params, system)
        while (line := read_line()) is not None and conversation.take(line):
            pass


class Conversation:
    """The messages so far, and what a line of input does to them."""

    def __init__(self, llm: ChatEngine, params: SamplingParams, system: str | None):
        """`params` are those of every answer; they must ask for DELTA outputs."""
        self._llm = llm
        self._params = params
        self._system = system
        self._turns: list[dict[str, str]] = []

    def take(self, line: str) -> bool:
        """Answers a line, or obeys its command; False for /exit."""
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            self._answer(line)
            return True
        command, _, rest = line.partition(" ")
        match command:
            case "/exit":
                return False
            case "/help":
                typer.echo(HELP, err=True)
            case "/reset":
                self._turns.clear()
            case "/system":
                self._system = rest.strip() or None
                self._turns.clear()
            case _:
                typer.echo(f"{command} is no command.\n{HELP}", err=True)
        return True

    def _answer(self, line: str) -> None:
        """Streams an answer. What was said before Ctrl-C stays part of the conversation."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        question = {"role": "user", "content": line}
        said: list[str] = []
        try:
            with (
                _interruptible() as stop,
                closing(self._llm.stream_chat([*system, *self._turns, question], self._params)) as outputs,
            ):
                for output in outputs:
                    piece = output.outputs[0].text
                    said.append(piece)
                    typer.echo(piece, nl=False)
                    sys.stdout.flush()
                    if stop.is_set():
                        typer.echo("\n[stopped]", err=True, nl=False)
                        break
        except UserError as error:  # too long a conversation, for example: the program goes on
            typer.echo(f"error: {error}\n/reset forgets the conversation.", err=True)
            return
        typer.echo()
        if said:
            self._turns += [question, {"role": "assistant", "content": "".join(said)}]


@contextmanager
def _interruptible() -> Generator[threading.Event]:
    """Ctrl-C sets the event, so that a step of the engine is never torn apart; a second one interrupts at once."""
    stop = threading.Event()

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _pipe_reader() -> str | None:
    """The next line of standard input, None at its end."""
    return sys.stdin.readline() or None


def _terminal_reader() -> Callable[[], str | None]:
    """A reader with line editing, and a history that the next session finds again."""
    from prompt_toolkit import PromptSession  # 0.2 s that other commands need not wait for

    session: PromptSession[str] = PromptSession(history=_history(platformdirs.user_state_path("atoma-jax")))

    def read() -> str | None:
        while True:
            try:
                return session.prompt("> ")
            except KeyboardInterrupt:  # clears the line
                continue
            except EOFError:
                return None

    return read


def _history(folder: Path) -> "History":
    """The lines typed so far, in a file that only the user may read; in memory where there is no place for it."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = folder / "chat_history"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        try:
            os.fchmod(descriptor, 0o600)  # it may be there with other rights
        finally:
            os.close(descriptor)
    except OSError as error:
        _log.warning("no history is kept: %s: %s", path, error.strerror)
        return InMemoryHistory()
    return FileHistory(path)
