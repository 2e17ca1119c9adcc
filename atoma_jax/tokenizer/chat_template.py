"""Chat templates: a conversation, checked and turned into plain data, rendered to text by the model's Jinja template.

Owns the shape of messages and which variables a caller may set. What a template may do is `template_sandbox.py`'s.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template, TemplateSyntaxError
from jinja2 import TemplateError as JinjaError

from atoma_jax.errors import TemplateError, UserError
from atoma_jax.tokenizer.template_budget import Budget, TemplateLimits
from atoma_jax.tokenizer.template_sandbox import TemplateSandbox

__all__ = ["ChatTemplate", "TemplateLimits", "render_chat"]

MAX_SOURCE_CHARACTERS = 1 << 16  # the longest published templates have half of it
_MAX_DEPTH = 64  # of lists and dictionaries in what callers hand in
_FINAL_TAG = "CONTINUE_FINAL_MESSAGE_TAG "

# Variables that render_chat sets itself, and names of arguments of this call or of encoding: never taken from
# chat_template_kwargs, whether the template reads them or not.
_RESERVED = frozenset(
    {
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
        "conversation", "tokenize", "bos_token", "eos_token", "pad_token", "unk_token", "add_special_tokens",
        "parse_special", "truncation", "padding", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs",
    }
)  # fmt: skip


class ChatTemplate:
    """One compiled template. Immutable, safe to use from several threads.

    Attributes:
        limits: what a rendering may use.
        variables: the names that the template reads and does not set itself.
    """

    def __init__(self, source: str, limits: TemplateLimits):
        """Compiles `source`. Raises `TemplateError` if it is too long or no template."""
        if len(source) > MAX_SOURCE_CHARACTERS:
            problem = f"a template may have at most {MAX_SOURCE_CHARACTERS} characters"
            raise TemplateError("chat_template", len(source), problem)
        self.limits = limits
        sandbox = TemplateSandbox(Budget(limits))
        try:
            self._code, self.variables = sandbox.compile_charged(source)
        except TemplateSyntaxError as error:
            raise TemplateError("chat_template", error.message, f"line {error.lineno} is no valid Jinja") from None
        except TemplateError:
            raise
        except Exception as error:  # nesting too deep for Python's own compiler is a SyntaxError, a RecursionError …
            raise TemplateError("chat_template", type(error).__name__, "cannot be compiled") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's text. `variables` hold plain data only.

        Raises:
            TemplateError: the template refused, failed, or exceeded its limits.
        """
        budget = Budget(self.limits)
        sandbox = TemplateSandbox(budget)
        template = Template.from_code(sandbox, self._code, sandbox.make_globals(None))
        pieces: list[str] = []
        length = 0
        try:
            for piece in template.root_render_func(template.new_context(dict(variables))):
                length += len(piece)
                budget.output(length)
                pieces.append(piece)
        except TemplateError:
            raise
        except JinjaError as error:
            raise TemplateError("chat_template", type(error).__name__, f"the template refused: {error}") from None
        except Exception as error:  # a template is a program that we did not write: it may fail in any way
            raise TemplateError("chat_template", type(error).__name__, f"the template failed: {error}") from error
        return "".join(pieces)


def render_chat(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_names: Mapping[str, str],
    add_generation_prompt: bool,
    continue_final_message: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    extra: Mapping[str, Any],
) -> str:
    """Renders a conversation; arguments and errors as `Tokenizer.apply_chat_template`."""
    if add_generation_prompt and continue_final_message:
        problem = "cannot go together with add_generation_prompt=True; set that to False"
        raise UserError("continue_final_message", True, problem)
    plain = _plain_messages(messages)
    variables: dict[str, Any] = {
        **special_names,
        **_extra_variables(template, extra),
        "messages": plain,
        "tools": _optional_list(template, "tools", tools),
        "documents": _optional_list(template, "documents", documents),
        "add_generation_prompt": add_generation_prompt,
    }
    if not continue_final_message:
        return template.render(variables)
    final = plain[-1].get("content")
    if not isinstance(final, str):
        raise UserError("continue_final_message", final, "needs a last message with text in its content")
    plain[-1]["content"] = final + _FINAL_TAG
    return _cut_at_tag(template.render(variables), final)


def _cut_at_tag(rendered: str, final: str) -> str:
    """Ends the text where the last message does. As `transformers`: a template that trims messages trims this one."""
    at = rendered.rfind(_FINAL_TAG.strip())
    if at < 0 or final.strip() not in rendered:
        problem = "the template does not show the last message as it is, so that it cannot be continued"
        raise TemplateError("continue_final_message", True, problem)
    kept = rendered[:at]
    return kept if rendered.startswith(_FINAL_TAG, at) else kept.rstrip()


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as plain data; content that is a list of text parts becomes one string, joined by line breaks."""
    plain = _plain("messages", messages, 0)
    if not isinstance(plain, list) or not plain:
        raise UserError("messages", messages, "must be a list with at least one message")
    for i, message in enumerate(plain):
        field = f"messages[{i}]"
        if not isinstance(message, dict):
            raise UserError(field, message, "must be an object with 'role' and 'content'")
        if not isinstance(message.get("role"), str):
            raise UserError(f"{field}.role", message.get("role"), "must be a string")
        message["content"] = _text_of_content(f"{field}.content", message.get("content"))
    return plain


def _text_of_content(field: str, content: Any) -> str | None:
    """A message's content as a string; None where it has none, as in a message of tool calls."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(field, content, "must be a string, or a list of text parts")
    texts: list[str] = []
    for i, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise UserError(f"{field}[{i}]", part, 'must be {"type": "text", "text": ...}; only text is supported')
        texts.append(text)
    return "\n".join(texts)


def _extra_variables(template: ChatTemplate, extra: Mapping[str, Any]) -> dict[str, Any]:
    """`chat_template_kwargs`: only variables that the template reads and that nothing else sets."""
    allowed = template.variables - _RESERVED
    for name in extra:
        if name not in allowed:
            known = ", ".join(sorted(allowed)) or "none"
            problem = f"this variable cannot be set; variables of this chat template that can be set: {known}"
            raise UserError(f"chat_template_kwargs.{name}", extra[name], problem)
    return {name: _plain(f"chat_template_kwargs.{name}", value, 0) for name, value in extra.items()}


def _optional_list(
    template: ChatTemplate, field: str, value: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]] | None:
    """`tools` or `documents` as plain data, refused where the template would leave them out."""
    if value is None:
        return None
    plain = _plain(field, value, 0)
    if not isinstance(plain, list) or not all(isinstance(item, dict) for item in plain):
        raise UserError(field, value, "must be a list of objects")
    if plain and field not in template.variables:
        raise UserError(field, value, f"this model's chat template does not take {field}; leave them out")
    return plain


def _plain(field: str, value: Any, depth: int) -> Any:
    """A copy made of JSON's types only, so that a template gets hold of no object with methods of its own."""
    if depth > _MAX_DEPTH:
        raise UserError(field, type(value).__name__, f"may be nested at most {_MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(field, value, "must be a finite number")
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise UserError(field, key, "the keys of objects must be strings")
        return {str.__str__(key): _plain(f"{field}.{key}", item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(f"{field}[{i}]", item, depth + 1) for i, item in enumerate(value)]
    raise UserError(field, type(value).__name__, "must be made of strings, numbers, booleans, null, lists and objects")
