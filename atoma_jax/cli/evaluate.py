"""`atoma-jax eval perplexity | kld`: flags and printing; the scoring is `atoma_jax/evaluation.py`."""

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from atoma_jax.cli.common import EngineOptions, print_json, running_engine
from atoma_jax.cli.options import flat_options
from atoma_jax.cli.protocol import LoadedPair
from atoma_jax.config import EngineConfig
from atoma_jax.errors import UserError
from atoma_jax.evaluation import Divergence, TextEncoder, diverge, score, split_special

evaluate = typer.Typer(name="eval", help="Measure how well a model does.", no_args_is_help=True)


_Text = Annotated[Path, typer.Option(help="A UTF-8 text.")]
_MaxTokens = Annotated[int | None, typer.Option(min=1, help="Score this much of the text; default: all.")]
_Context = Annotated[
    int | None, typer.Option(help="Tokens that go through the model together; default: as many as it takes.")
]
_Stride = Annotated[
    int | None, typer.Option(help="New tokens of each further window; default: all but one of the context.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print one object.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerOptions:
    """Those flags of an engine that decide what a model computes; as in `EngineOptions`."""

    model: Annotated[str | None, typer.Option("--model", "-m", help="As in `atoma-jax generate`.")] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit, for hub ids.")] = None
    config: Annotated[Path | None, typer.Option(help="TOML file of settings; flags win over it.")] = None
    dtype: Annotated[str | None, typer.Option(help="Of matrix products: auto, float32 or bfloat16.")] = None
    quantization: Annotated[str | None, typer.Option(help="Of the model's dense weights while they load.")] = None
    weight_layout: Annotated[str | None, typer.Option(help="Of quantized weights: auto, rows or planar.")] = None
    kernels: Annotated[str | None, typer.Option(help="auto, pallas, xla or interpret.")] = None
    kv_cache_dtype: Annotated[str | None, typer.Option(help="Of the model's KV cache; the base's is auto.")] = None
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None
    compile_cache_dir: Annotated[Path | None, typer.Option(help="Keeps compiled programs for the next start.")] = None
    compile_cache: Annotated[
        bool, typer.Option("--compile-cache/--no-compile-cache", help="Whether compiled programs are kept.")
    ] = True

    def engine_config(self) -> EngineConfig:
        """The settings, checked; errors as in `EngineOptions.engine_config`."""
        flags = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return EngineOptions(**flags).engine_config()


@evaluate.command()
@flat_options
def perplexity(
    engine: EngineOptions,
    text: _Text,
    max_tokens: _MaxTokens = None,
    context: _Context = None,
    stride: _Stride = None,
    per_token: Annotated[bool, typer.Option(help="With --json: also each token's score.")] = False,
    as_json: _Json = False,
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
        with tqdm(total=scored, unit="tok", desc="scoring", disable=None if as_json else False) as bar:
            result = score(
                running.llm,
                ids,
                before=before,
                context=context,
                stride=stride,
                at_once=running.llm.llm_engine.model_config.max_num_seqs,
                on_window=bar.update,
            )
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


@evaluate.command()
@flat_options
def kld(
    engine: ScorerOptions,
    base: Annotated[str, typer.Option(help="What --model is measured against, as --model; in F32 or F16 as a rule.")],
    text: _Text,
    max_tokens: _MaxTokens = None,
    context: _Context = None,
    stride: _Stride = None,
    as_json: _Json = False,
) -> None:
    """KL divergence from a base, same-top-token rate and perplexities over a text, every token given those before it.

    Both models run with the same settings, but for --quantization and --kv-cache-dtype, which are the model's alone.
    """
    content = _read(text)
    config = engine.engine_config()
    if config.mesh.mesh is not None:
        raise UserError("mesh", config.mesh.mesh, "is not for eval kld, whose models run on one device: leave it out")
    pair = _load(_base_config(config, base), config)
    before, ids = _same_ids(pair, content)
    longest = pair.max_model_len
    if context is not None and context > longest:
        raise UserError("context", context, f"must be at most {longest}, the tokens that both models take")
    context = longest if context is None else context
    stride = context - len(before) - 1 if stride is None else stride
    ids = ids[:max_tokens]
    total = len(ids) if before else max(0, len(ids) - 1)
    with tqdm(total=total, unit="tok", desc="comparing", disable=None if as_json else False) as bar:
        result = diverge(pair, ids, before=before, context=context, stride=stride, on_tokens=bar.update)
    if not as_json:
        typer.echo(_as_text(result))
        return
    values: dict[str, Any] = {"model": config.model.model, "base": base, "text": str(text)}
    values |= {name: _finite(value) for name, value in result.summary().items()}
    print_json({**values, "context": context, "stride": stride, "windows": result.num_windows})


def _base_config(config: EngineConfig, base: str) -> EngineConfig:
    """Settings of the base: the model's, but for what is done to the model."""
    revision = config.model.revision if base == config.model.model else None
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, model=base, revision=revision, quantization=None),
        cache=dataclasses.replace(config.cache, kv_cache_dtype="auto"),
    )


def _load(base: EngineConfig, model: EngineConfig) -> LoadedPair:
    """Loads both, and says on standard error when each is there."""
    started = time.perf_counter()
    from atoma_jax import ModelPair  # imports JAX: seconds that errors of the command line must not wait for

    def report(name: str) -> None:
        typer.echo(f"{name:<12}{time.perf_counter() - started:7.2f} s", err=True)

    return ModelPair.load(base, model, on_loaded=report)


def _same_ids(pair: LoadedPair, text: str) -> tuple[list[int], list[int]]:
    """`split_special` of a text, which both tokenizers must agree on."""
    found = split_special(pair.get_tokenizer(), text)
    other: TextEncoder = pair.model.tokenizer
    if split_special(other, text) != found:
        raise UserError("base", pair.base.model, "must have the tokenizer of the model, which reads the text otherwise")
    return found


def _as_text(result: Divergence) -> str:
    """Lines for people, in the order of llama.cpp's."""
    names = {
        "perplexity": ("perplexity", 1, ""),
        "base_perplexity": ("perplexity of the base", 1, ""),
        "log_perplexity_ratio": ("ln of their ratio", 1, ""),
        "mean_kld": ("mean KLD", 1, ""),
        "mean_dp": ("mean Δp", 100, " %"),
        "rms_dp": ("RMS Δp", 100, " %"),
        "same_top": ("same top token", 100, " %"),
    }
    estimates = result.estimates
    lines: list[str] = []
    for name, (label, factor, unit) in names.items():
        value, error = estimates[name]
        spread = "" if error is None else f" ± {factor * error:.6f}"
        lines.append(f"{label:<24}{factor * value:12.6f}{spread}{unit}")
    lines += [f"{name.replace('_kld', ' KLD'):<24}{value:12.6f}" for name, value in result.kld_quantiles.items()]
    nan = f", at {result.num_nan} of which a model's logits are not finite" if result.num_nan else ""
    return "\n".join([*lines, f"{len(result.kld)} tokens in {result.num_windows} windows{nan}"])


def _finite(value: float | int | None) -> float | int | None:
    """JSON has no infinity: null stands for the score of a token that the model holds impossible."""
    return value if value is not None and math.isfinite(value) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError("text", str(path), f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError("text", str(path), f"must be UTF-8 text: {error}") from error
