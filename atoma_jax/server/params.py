"""From a request's fields to `SamplingParams`: what `null` stands for, and OpenAI's spelling of things."""

from typing import Any

from atoma_jax import RequestOutputKind, SamplingParams, StructuredOutputsParams
from atoma_jax.server.errors import Problem
from atoma_jax.server.schemas import ChatRequest, CompletionRequest, SamplingRequest
from atoma_jax.server.structured import constraint_of

_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # else the model's makers decide
_AS_IT_IS = (
    *("n", "stop", "presence_penalty", "frequency_penalty", "seed", "min_tokens", "ignore_eos", "stop_token_ids"),
    *("include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "allowed_token_ids"),
    *("bad_words", "prompt_logprobs"),
)
COMPLETION_TOKENS = 16  # OpenAI's default


def completion_params(request: CompletionRequest, recommended: SamplingParams) -> SamplingParams:
    """The settings of a completion. Raises `UserError` or `Problem` for what is outside its limits."""
    settings = _shared(request, recommended)
    max_tokens = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    if max_tokens == 0 and request.echo:
        max_tokens = 1  # the engine always samples a token; it is dropped again (`drops_output`)
    if request.echo and request.logprobs is not None:
        settings.setdefault("prompt_logprobs", request.logprobs)
    return SamplingParams(**settings, max_tokens=max_tokens, logprobs=request.logprobs)


def drops_output(request: SamplingRequest) -> bool:
    """Whether the prompt alone is wanted: `echo` with `max_tokens: 0`."""
    return bool(isinstance(request, CompletionRequest) and request.echo and request.max_tokens == 0)


def chat_params(
    request: ChatRequest, recommended: SamplingParams, forced: StructuredOutputsParams | None = None
) -> SamplingParams:
    """The settings of an answer; `forced` is what a tool's call must look like. Raises as `completion_params`."""
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    if request.top_logprobs is not None and not request.logprobs and request.top_logprobs != 0:
        raise Problem(400, "when using `top_logprobs`, `logprobs` must be set to true.", param="top_logprobs")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    settings = _shared(request, recommended)
    if forced is not None:
        settings["structured_outputs"] = forced
    return SamplingParams(**settings, max_tokens=max_tokens, logprobs=logprobs)


def _shared(request: SamplingRequest, recommended: SamplingParams) -> dict[str, Any]:
    settings: dict[str, Any] = {name: getattr(recommended, name) for name in _RECOMMENDED}
    for name in (*_RECOMMENDED, *_AS_IT_IS):
        value = getattr(request, name)
        if value is not None:
            settings[name] = value
    settings["output_kind"] = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
    settings["structured_outputs"] = constraint_of(request)
    if request.logit_bias is not None:
        settings["logit_bias"] = _bias(request.logit_bias)
    return settings


def _bias(biases: dict[str, float]) -> dict[int, float]:
    """JSON's keys are strings, the engine's are token ids."""
    ids: dict[int, float] = {}
    for key, value in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise Problem(400, f"logit_bias: its keys must be token ids, got {key[:40]!r}.", param="logit_bias")
        ids[int(key)] = value
    return ids
