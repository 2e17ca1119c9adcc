"""What clients may ask for and this server cannot do yet, refused by name. The one place to change once it can."""

from typing import Any

from atoma_jax.server.errors import Problem
from atoma_jax.server.schemas import ChatRequest, CompletionRequest, SamplingRequest


def refuse_unsupported(request: SamplingRequest) -> None:
    """Raises `Problem` (400) for the first field that would have no effect."""
    kind = (request.response_format or {}).get("type", "text")
    if kind != "text":
        raise _refusal("response_format.type", kind, 'structured output is not implemented: only "text" is')
    if request.structured_outputs:
        raise _refusal("structured_outputs", "an object", "structured output is not implemented")
    if request.logprob_token_ids is not None:
        raise _refusal("logprob_token_ids", "a list", "is not implemented: ask for logprobs instead")
    if isinstance(request, ChatRequest):
        _refuse_tools(request)
        if request.chat_template is not None:
            raise _refusal(
                "chat_template", "a text", "cannot be set by a request, only by the server's --chat-template"
            )
    if isinstance(request, CompletionRequest):
        if request.suffix:
            raise _refusal("suffix", "a text", "this model does not fill in the middle")
        if request.best_of is not None and request.best_of != (1 if request.n is None else request.n):
            raise _refusal("best_of", request.best_of, "must be n or left out: all samples are returned")


def _refuse_tools(request: ChatRequest) -> None:
    if request.tools:
        raise _refusal("tools", f"{len(request.tools)} tools", "tool calls are not implemented")
    if request.tool_choice not in (None, "none", "auto"):
        raise _refusal("tool_choice", "a choice", "tool calls are not implemented")


def _refusal(field: str, value: Any, problem: str) -> Problem:
    return Problem(400, f"{field}: {problem}, got {value!r}."[:400], param=field)
