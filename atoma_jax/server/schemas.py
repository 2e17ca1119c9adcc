"""What requests may hold: names and types, strictly. Limits of values are the engine's; `null` is the same as absent.

A key that is not here is accepted, left alone, and named in the answer's headers (`ignored_fields`). What is here but
cannot be served yet is refused by name in `unsupported.py`.
"""

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

_INTEGER_LISTS = [{"type": "array", "items": {"type": "integer"}}]
_PROMPT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        *_INTEGER_LISTS,
        {"type": "array", "items": _INTEGER_LISTS[0]},
    ]
}
# Checked in prompts.py: a union would report an error for each of a million tokens.
PromptField = Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]
Count = Annotated[int, Field(ge=-(2**63), lt=2**64)]  # nothing needs more, and error messages stay short
_LONGEST_HEADER = 1000  # characters


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    def ignored_fields(self) -> str:
        """Keys that mean nothing here, as a header's value; empty where there are none."""
        names = [re.sub(r"[^A-Za-z0-9_.-]", "?", name)[:64] for name in self.model_extra or {}]
        return ", ".join(names)[:_LONGEST_HEADER]


class StreamOptions(_Request):
    """How a stream reports what it used."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingRequest(_Request):
    """What `/v1/completions` and `/v1/chat/completions` share."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None
    min_p: float | None = None
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Count | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Count] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: Count | None = None
    allowed_token_ids: list[Count] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: Count | None = None
    logprob_token_ids: list[Count] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: Count | None = None
    request_id: str | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = Field(default=None, max_length=1024)
    include_metrics: bool | None = None
    user: str | None = None


class CompletionRequest(SamplingRequest):
    """A text, or several, to go on from."""

    prompt: PromptField = None
    logprobs: Count | None = None
    suffix: str | None = None
    best_of: Count | None = None


class ChatRequest(SamplingRequest):
    """A conversation to go on with."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    max_completion_tokens: Count | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None


class TokenizeRequest(_Request):
    """A text or a conversation to cut into tokens."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Request):
    """Tokens to turn into text."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


class EmbeddingRequest(_Request):
    """Texts to turn into vectors."""

    model: str | None = None
    input: PromptField = None
    encoding_format: str | None = None
    dimensions: Count | None = None
    normalize: bool | None = None
    truncate_prompt_tokens: Count | None = None
    add_special_tokens: bool | None = None
    priority: Count | None = None
    user: str | None = None
