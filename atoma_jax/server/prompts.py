"""From a request's prompt or messages to tokens. Runs in a worker thread: templates and long texts take their time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atoma_jax import AsyncLLM
from atoma_jax.server.errors import Problem
from atoma_jax.server.schemas import ChatRequest, CompletionRequest, EmbeddingRequest, TokenizeRequest
from atoma_jax.server.settings import ServerConfig
from atoma_jax.server.tools import plain_messages

_JSON_NAMES = {bool: "a boolean", float: "a number", dict: "an object", list: "a list", str: "a string"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: its tokens.
        text: as the client sent it or the template made it; None where tokens were sent.
    """

    ids: list[int]
    text: str | None


class PromptReader:
    """Knows the model's tokenizer and the server's limits.

    Attributes:
        tokenizer: the model's, with the chat template that is served.
    """

    def __init__(self, llm: AsyncLLM, settings: ServerConfig, chat_template: str | None):
        """`chat_template` is a source instead of the model's own. Raises `UserError` if it is no template."""
        own = llm.get_tokenizer()
        self.tokenizer = own if chat_template is None else own.with_chat_template(chat_template)
        self._settings = settings
        self._max_len: int = llm.model_config.max_model_len
        self._vocab_size: int = llm.model_config.vocab_size

    def of_completion(self, request: CompletionRequest) -> list[Prompt]:
        """The prompts of a request, in order. Raises `UserError` or `Problem`."""
        special = request.add_special_tokens is not False
        prompts = [self._prompt(field, item, special) for field, item in _listed(request.prompt)]
        return [_truncated(prompt, request.truncate_prompt_tokens, self._max_len) for prompt in prompts]

    def of_embedding(self, request: EmbeddingRequest) -> list[Prompt]:
        """The inputs of a request, in order. Raises `UserError` or `Problem`."""
        special = request.add_special_tokens is not False
        prompts = [self._prompt(field, item, special) for field, item in _listed(request.input, "input")]
        return [_truncated(prompt, request.truncate_prompt_tokens, self._max_len + 1) for prompt in prompts]

    def of_chat(self, request: ChatRequest) -> Prompt:
        """The conversation. Raises `UserError` or `Problem`."""
        extra = dict(request.chat_template_kwargs or {})
        if request.reasoning_effort is not None:
            extra["reasoning_effort"] = request.reasoning_effort
        prompt = self._conversation(
            request.messages,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            documents=request.documents,
            tools=request.tools or None,
            extra=extra,
            special=bool(request.add_special_tokens),
        )
        return _truncated(prompt, request.truncate_prompt_tokens, self._max_len)

    def of_tokenize(self, request: TokenizeRequest) -> Prompt:
        """What `/tokenize` is asked for. Raises `UserError` or `Problem`."""
        if (request.prompt is None) == (request.messages is None):
            raise Problem(400, "prompt: give exactly one of prompt and messages.", param="prompt")
        if request.messages is None:
            return self._prompt("prompt", request.prompt, request.add_special_tokens is not False)
        return self._conversation(
            request.messages,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            documents=None,
            tools=request.tools or None,
            extra=request.chat_template_kwargs or {},
            special=bool(request.add_special_tokens),
        )

    def _conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None,
        continue_final_message: bool | None,
        documents: Sequence[Mapping[str, Any]] | None,
        tools: Sequence[Mapping[str, Any]] | None,
        extra: Mapping[str, Any],
        special: bool,
    ) -> Prompt:
        limit = self._settings.max_messages
        if len(messages) > limit:
            raise Problem(
                400, f"messages: must be at most {limit} (--max-messages), got {len(messages)}.", param="messages"
            )
        text = self.tokenizer.apply_chat_template(
            plain_messages(messages),
            add_generation_prompt=add_generation_prompt is not False,
            continue_final_message=bool(continue_final_message),
            documents=documents,
            tools=tools,
            chat_template_kwargs=extra,
        )
        _check_text("messages", text)
        return Prompt(self.tokenizer.encode(text, add_special_tokens=special, parse_special=True), text)

    def _prompt(self, field: str, item: Any, special: bool) -> Prompt:
        if isinstance(item, str):
            _check_text(field, item)
            return Prompt(self.tokenizer.encode(item, add_special_tokens=special), item)
        for place, token in enumerate(item):
            if type(token) is not int or not 0 <= token < self._vocab_size:
                shown = repr(token)[:40]
                problem = f"{field}[{place}]: must be a token id in [0, {self._vocab_size}), got {shown}."
                raise Problem(400, problem, param=field.partition("[")[0])
        return Prompt(item, None)


def _check_text(field: str, text: str) -> None:
    if "\0" in text:  # no text that people write; what reads logs and files behind us may end there
        raise Problem(400, f"{field}: holds the character U+0000: leave it out.", param=field.partition("[")[0])


def _listed(prompt: Any, name: str = "prompt") -> list[tuple[str, str | list[Any]]]:
    """A text, a list of tokens, or a list of either: each with its place in the field `name`."""
    if isinstance(prompt, str):
        return [(name, prompt)]
    if not isinstance(prompt, list) or not prompt:
        raise _not_a_prompt(name, prompt)
    items: list[Any] = prompt
    if isinstance(items[0], int) and not isinstance(items[0], bool):
        return [(name, items)]
    listed: list[tuple[str, str | list[Any]]] = []
    for place, item in enumerate(items):
        if not isinstance(item, (str, list)):
            raise _not_a_prompt(f"{name}[{place}]", item)
        listed.append((f"{name}[{place}]", item))
    return listed


def _not_a_prompt(field: str, value: Any) -> Problem:
    shown = "null" if value is None else "an empty list" if value == [] else _JSON_NAMES.get(type(value), "a number")
    return Problem(
        400,
        f"{field}: must be a text, a list of token ids, or a list of these, got {shown}.",
        param=field.partition("[")[0],
    )


def _truncated(prompt: Prompt, keep: int | None, max_len: int) -> Prompt:
    """The last tokens alone, where the client asks for that."""
    if keep is None:
        return prompt
    if not (keep == -1 or 1 <= keep < max_len):
        problem = f"truncate_prompt_tokens: must be -1, or at least 1 and below {max_len}, got {keep}."
        raise Problem(400, problem, param="truncate_prompt_tokens")
    keep = max_len - 1 if keep == -1 else keep  # room for a token of the answer
    return prompt if len(prompt.ids) <= keep else Prompt(prompt.ids[-keep:], None)
