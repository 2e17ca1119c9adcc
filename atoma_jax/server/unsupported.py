"""What clients may ask for and this server cannot do yet, refused by name. The one place to change once it can."""

from typing import Any

from atoma_jax.server.errors import Problem
from atoma_jax.server.schemas import ChatRequest, CompletionRequest, SamplingRequest


def refuse_unsupported(request: SamplingRequest) -> None:
    """Raises `Problem` (400) for the first field that would have no effect."""
    if request.logprob_token_ids is not None:
        raise _refusal("logprob_token_ids", "a list", "is not implemented: ask for logprobs instead")
    if isinstance(request, ChatRequest) and request.chat_template is not None:
        raise _refusal("chat_template", "a text", "cannot be set by a request, only by the server's --chat-template")
    if isinstance(request, CompletionRequest):
        if request.suffix:
            raise _refusal("suffix", "a text", "this model does not fill in the middle")
        if request.best_of is not None and request.best_of != (1 if request.n is None else request.n):
            raise _refusal("best_of", request.best_of, "must be n or left out: all samples are returned")


def _refusal(field: str, value: Any, problem: str) -> Problem:
    return Problem(400, f"{field}: {problem}, got {value!r}."[:400], param=field)
