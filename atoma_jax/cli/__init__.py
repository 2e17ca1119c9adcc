"""The `atoma-jax` program: its commands, its exit codes, and where messages go.

Results go to standard output, everything else to standard error. Exit codes: 0 done; 1 the engine or a download failed;
2 the caller asked for something that cannot be; 130 interrupted. One module a command; none of them imports JAX before
an engine is built, so that help, `pull`, `quantize` and a mistyped option answer at once.
"""

import errno
import logging
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from atoma_jax import __version__
from atoma_jax.cli.bench import bench
from atoma_jax.cli.chat import chat
from atoma_jax.cli.convert import convert
from atoma_jax.cli.evaluate import evaluate
from atoma_jax.cli.generate import generate
from atoma_jax.cli.plan import plan
from atoma_jax.cli.pull import pull
from atoma_jax.cli.quantize import quantize
from atoma_jax.cli.serve import serve
from atoma_jax.errors import AtomaError, UserError

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class _Commands(TyperGroup):
    """Turns exceptions of every command into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that the arguments name. The context is typer's own type, which it does not export."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except AtomaError as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of a pipe went away; typer ends quietly
                raise
            self._internal(ctx, error)
        except Exception as error:  # typer's own, a usage error for example, are RuntimeErrors and subclasses of it
            if type(error).__module__.startswith(("typer", "click")):
                raise
            self._internal(ctx, error)

    @staticmethod
    def _internal(ctx: Any, error: Exception) -> None:
        if ctx.params["debug"]:
            raise error
        typer.echo(
            f"error: {type(error).__name__}: {error}\n"
            "This is a fault of the program, not of your input. `atoma-jax --debug …` shows where it happened.",
            err=True,
        )
        raise typer.Exit(EXIT_FAILED) from None


class _StderrHandler(logging.Handler):
    """Writes to whatever standard error is at that moment, which tests and progress bars replace."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record as a line."""
        typer.echo(self.format(record), err=True)


app = typer.Typer(
    name="atoma-jax",
    cls=_Commands,
    help="LLM inference on JAX: quantized weights, paged KV cache, continuous batching.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _command in (generate, chat, serve, pull, plan, convert, quantize):
    app.command()(_command)
app.add_typer(bench)
app.add_typer(evaluate)


def _show_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"atoma-jax {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more, on standard error.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    root, own = logging.getLogger(), logging.getLogger("atoma_jax")
    if not any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    own.setLevel(logging.DEBUG if verbose or debug else logging.INFO)


def main() -> None:
    """The program's entry point."""
    app(prog_name="atoma-jax")
