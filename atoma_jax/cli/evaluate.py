"""`atoma-jax eval perplexity`: flags and printing; the scoring is `atoma_jax/evaluation.py`."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from atoma_jax.cli.common import EngineOptions, print_json, running_engine
from atoma_jax.cli.options import flat_options
from atoma_jax.errors import UserError
from atoma_jax.evaluation import score, split_special

evaluate = typer.Typer(name="eval", help="Measure how well a model does.", no_args_is_help=True)


@evaluate.callback()
def _group() -> None:
    """Keeps `perplexity` a command of its own: typer drops the name of a group's only command."""


@evaluate.command()
@flat_options
def perplexity(
    engine: EngineOptions,
    text: Annotated[Path, typer.Option(help="A UTF-8 text.")],
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Score this much of the text; default: all.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens that go through the model together; default: as many as it takes.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="New tokens of each further window; default: all but one of the context.")
    ] = None,
    per_token: Annotated[bool, typer.Option(help="With --json: also each token's score.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object.")] = False,
) -> None:
    """Mean negative log-likelihood and perplexity of a text, every token given those before it."""
    if per_token and not as_json:
        raise UserError("per_token", per_token, "needs --json")
    content = _read(text)
    config = engine.engine_config()
    with running_engine(config) as running:
        before, ids = split_special(running.llm.get_tokenizer(), content)
        longest = running.llm.llm_engine.model_config.max_model_len - 1  # a request needs room for one output token
        if context is not None and context > longest:
            raise UserError("context", context, f"must be at most {longest}: max_model_len less one output token")
        context = longest if context is None else context
        stride = context - len(before) - 1 if stride is None else stride
        ids = ids[:max_tokens]
        scored = len(ids) if before else max(0, len(ids) - 1)
        with tqdm(total=scored, unit="tok", desc="scoring") as bar:
            result = score(running.llm, ids, before=before, context=context, stride=stride, on_window=bar.update)
    if not as_json:
        typer.echo(f"perplexity {result.perplexity:.4f}, mean NLL {result.mean_nll:.5f}, {len(result.nll)} tokens")
        return
    values: dict[str, Any] = {
        "model": config.model.model,
        "text": str(text),
        "tokens": len(result.nll),
        "mean_nll": _finite(result.mean_nll),
        "standard_error": _finite(result.standard_error),
        "perplexity": _finite(result.perplexity),
        "context": context,
        "stride": stride,
        "windows": result.num_windows,
    }
    if per_token:
        values["token_ids"] = list(result.token_ids)
        values["nll"] = [_finite(value) for value in result.nll]
    print_json(values)


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: null stands for the score of a token that the model holds impossible."""
    return value if value is not None and math.isfinite(value) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError("text", str(path), f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError("text", str(path), f"must be UTF-8 text: {error}") from error
