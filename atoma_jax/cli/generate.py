"""`atoma-jax generate`: one prompt, its text on standard output as it comes, or everything about it as JSON."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from atoma_jax.cli.common import (
    LOWEST_LOGPROB,
    EngineOptions,
    RunningEngine,
    SamplingOptions,
    print_json,
    running_engine,
)
from atoma_jax.cli.options import flat_options
from atoma_jax.errors import UserError
from atoma_jax.outputs import CompletionOutput, PositionLogprobs, RequestMetrics, RequestOutput
from atoma_jax.sampling_params import RequestOutputKind, SamplingParams


@flat_options
def generate(
    engine: EngineOptions,
    sampling: SamplingOptions,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to go on from.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(allow_dash=True, help="The same from a file; - is standard input.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    n: Annotated[int, typer.Option("--n", help="Samples to draw.")] = 1,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: the likeliest tokens to show beside each chosen one.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Put the prompt into the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object: ids, text, logprobs, timings.")] = False,
) -> None:
    """Continue a prompt, or answer it with --chat."""
    if system is not None and not chat:
        raise UserError("system", system, "needs --chat: a raw prompt has no system message")
    if logprobs is not None and not as_json:
        raise UserError("logprobs", logprobs, "needs --json: text has no place for them")
    streamed = n == 1 and not as_json
    params = sampling.params(
        max_tokens=max_tokens,
        seed=engine.seed,
        n=n,
        logprobs=(logprobs or 0) if as_json else None,
        output_kind=RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY,
    )
    config = engine.engine_config()
    text = _read_prompt(prompt, prompt_file)
    messages: list[dict[str, str]] | None = None
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
    with running_engine(config) as running:
        params = sampling.completed(params, running.llm.get_default_sampling_params())
        if streamed:
            _stream(running, text, messages, params)
            return
        output = (
            running.llm.generate([text], params, use_tqdm=False)
            if messages is None
            else running.llm.chat(messages, params, use_tqdm=False)
        )[0]
        if as_json:
            print_json({"model": config.model.model, **output_json(output), "timings": _timings(running, output)})
            return
        for sample in output.outputs:
            typer.echo(f"[{sample.index + 1}/{n}] {sample.text}")
        _summary(running, output.metrics, sum(len(sample.token_ids) for sample in output.outputs))


def output_json(output: RequestOutput) -> dict[str, Any]:
    """A finished request as keys of a JSON object."""
    return {
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "num_cached_tokens": output.num_cached_tokens,
        "outputs": [_sample_json(sample) for sample in output.outputs],
    }


def _sample_json(sample: CompletionOutput) -> dict[str, Any]:
    total = sample.cumulative_logprob
    return {
        "index": sample.index,
        "text": sample.text,
        "token_ids": sample.token_ids,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
        "cumulative_logprob": None if total is None else max(total, LOWEST_LOGPROB),
        "logprobs": None if sample.logprobs is None else [_position_json(entry) for entry in sample.logprobs],
    }


def _position_json(entry: PositionLogprobs) -> list[dict[str, Any]]:
    """One position: the chosen token first, then the likeliest ones by rank."""
    return [
        {
            "token_id": token_id,
            "token": logprob.decoded_token,
            "logprob": max(logprob.logprob, LOWEST_LOGPROB),
            "rank": logprob.rank,
        }
        for token_id, logprob in entry.items()
    ]


def _timings(running: RunningEngine, output: RequestOutput) -> dict[str, Any]:
    metrics = output.metrics
    assert metrics is not None, "the engine fills the metrics of every finished request"
    tokens = sum(len(sample.token_ids) for sample in output.outputs)
    return {
        **running.startup_json(),
        "prompt_tokens": len(output.prompt_token_ids),
        "output_tokens": tokens,
        "ttft_s": metrics.time_to_first_token,
        "decode_s": metrics.decode_time,
        "decode_tokens_per_s": _decode_rate(metrics, tokens, len(output.outputs)),
        "e2e_s": metrics.e2e_time,
    }


def _stream(running: RunningEngine, text: str, messages: list[dict[str, str]] | None, params: SamplingParams) -> None:
    """Writes the output piece by piece, then the summary."""
    outputs = running.llm.stream(text, params) if messages is None else running.llm.stream_chat(messages, params)
    metrics: RequestMetrics | None = None
    tokens = 0
    for output in outputs:
        sample = output.outputs[0]
        typer.echo(sample.text, nl=False)
        sys.stdout.flush()
        tokens += len(sample.token_ids)
        metrics = output.metrics
    typer.echo()
    _summary(running, metrics, tokens)


def _summary(running: RunningEngine, metrics: RequestMetrics | None, tokens: int) -> None:
    assert metrics is not None, "the engine fills the metrics of every output"
    parts = [f"{tokens} token{'s' if tokens != 1 else ''}"]
    if metrics.time_to_first_token is not None:
        parts.append(f"first after {metrics.time_to_first_token:.3f} s")
    rate = _decode_rate(metrics, tokens, 1)
    if rate is not None:
        parts.append(f"then {rate:.1f} tokens/s")
    typer.echo(f"{', '.join(parts)}\n{running.startup_line()}", err=True)


def _decode_rate(metrics: RequestMetrics, tokens: int, samples: int) -> float | None:
    """Tokens a second after each sample's first; None where there is no second token."""
    if not metrics.decode_time or tokens <= samples:
        return None
    return (tokens - samples) / metrics.decode_time


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise UserError("prompt", prompt, "give exactly one of --prompt and --prompt-file")
    if prompt is not None:
        return prompt
    assert file is not None
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError("prompt_file", str(file), f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError("prompt_file", str(file), f"must be UTF-8 text: {error}") from error
