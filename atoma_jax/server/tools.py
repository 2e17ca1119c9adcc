"""Tools of a chat request: what may be asked for, what an answer is held to, and how past calls go into the template.

Which text is a call is `tool_calls.py`'s. A call that must be made (`tool_choice` required, or a function by name), and
one that a model begins by itself where a function is `strict`, is written under a grammar (`tool_grammars.py`), in the
same style in which calls are read.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atoma_jax import StructuredOutputsParams
from atoma_jax.server.errors import Problem
from atoma_jax.server.schemas import ChatRequest
from atoma_jax.server.settings import ServerConfig
from atoma_jax.server.tool_calls import STYLES, ToolCallParser, ToolStyle
from atoma_jax.server.tool_grammars import forced_grammar, held_grammar

MAX_TOOLS = 128  # OpenAI's limit
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How the answers to one request call tools.

    Attributes:
        style: how calls are written.
        limit: calls of an answer; None: any number.
        forced: the functions of which one or more must be called; empty: the model decides.
        held: where it does, the functions that calls are held to; empty: it writes what it wants.
        named: the request names the function.
    """

    style: ToolStyle
    limit: int | None
    forced: tuple[dict[str, Any], ...] = ()
    held: tuple[dict[str, Any], ...] = ()
    named: bool = False

    @property
    def constraint(self) -> StructuredOutputsParams | None:
        """What the answer's text must look like; None: anything."""
        if not self.forced and not self.held:
            return None
        written = forced_grammar if self.forced else held_grammar
        grammar = written(self.style, self.forced or self.held, single=self.limit == 1)
        return StructuredOutputsParams(grammar=grammar, named="tools")

    def parser(self) -> ToolCallParser:
        """For one answer."""
        return ToolCallParser(self.style, limit=self.limit)

    def finish_reason(self, reason: str | None, parser: ToolCallParser) -> str | None:
        """What an answer ended with; who named the function gets "stop", as from OpenAI."""
        return "tool_calls" if reason == "stop" and parser.num_calls and not self.named else reason


def tool_use(request: ChatRequest, settings: ServerConfig) -> ToolUse | None:
    """How the request's answers call tools; None: they do not.

    Raises:
        Problem: a tool or the choice is not valid, or needs what the server was not started with.
    """
    functions = [_function(index, tool) for index, tool in enumerate(request.tools or ())]
    if len(functions) > MAX_TOOLS:
        raise _problem("tools", f"must be at most {MAX_TOOLS}, got {len(functions)}")
    names = [function["name"] for function in functions]
    if len(set(names)) < len(names):
        raise _problem("tools", "must have names of their own, and two are called alike")
    choice = request.tool_choice
    if choice is None:
        choice = "auto" if functions else "none"
    if isinstance(choice, str) and choice not in _CHOICES:
        raise _problem("tool_choice", f"must be {', '.join(_CHOICES)} or a function, got {choice[:60]!r}")
    if choice == "none" or (choice == "auto" and not functions):
        return None
    if not functions:
        raise _problem("tool_choice", "needs tools, and there are none")
    limit = 1 if request.parallel_tool_calls is False else None
    constrained = request.response_format not in (None, {"type": "text"}) or bool(request.structured_outputs)
    if choice == "auto":
        if not settings.enable_auto_tool_choice or settings.tool_call_parser is None:
            problem = '"auto" needs a server with --enable-auto-tool-choice and --tool-call-parser; or ask for "none"'
            raise _problem("tool_choice", problem)
        strict = [index for index, function in enumerate(functions) if function.get("strict")]
        if strict and constrained:
            problem = 'holds calls to a schema, which response_format and structured_outputs contradict under "auto"'
            raise _problem(f"tools[{strict[0]}].function.strict", problem)
        return ToolUse(STYLES[settings.tool_call_parser], limit, held=tuple(functions) if strict else ())
    if constrained:
        raise _problem("tool_choice", "asks for a call, which response_format and structured_outputs contradict")
    style = STYLES[settings.tool_call_parser or "hermes"]
    if choice == "required":
        return ToolUse(style, limit, forced=tuple(functions))
    return ToolUse(style, 1, forced=(_chosen(choice, functions),), named=True)


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of past calls as objects, which is what templates take; clients send their text.

    Raises:
        Problem: a call has no function, or arguments that are no JSON object.
    """
    return [_plain_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _plain_message(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    plain = dict(message)
    if calls is None or calls == []:
        plain.pop("tool_calls", None)
        return plain
    if not isinstance(calls, list):
        raise _problem(f"{where}.tool_calls", "must be a list")
    plain["tool_calls"] = [_plain_call(f"{where}.tool_calls[{index}]", call) for index, call in enumerate(calls)]
    return plain


def _plain_call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _problem(f"{where}.function", "must be an object with a name")
    arguments = function.get("arguments")
    try:
        value = json.loads(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _problem(f"{where}.function.arguments", "must be the text of a JSON object")
    return {**call, "function": {**function, "arguments": value}}


def _function(index: int, tool: Any) -> dict[str, Any]:
    where = f"tools[{index}]"
    if tool.get("type") != "function":
        raise _problem(f"{where}.type", f'must be "function", got {str(tool.get("type"))[:40]!r}')
    function = tool.get("function")
    if not isinstance(function, dict):
        raise _problem(f"{where}.function", "must be an object with a name")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _problem(f"{where}.function.name", "must be 1 to 64 letters, digits, underscores, dots or dashes")
    if not isinstance(function.get("parameters", {}), dict | None):
        raise _problem(f"{where}.function.parameters", "must be a JSON schema, an object")
    if not isinstance(function.get("strict"), bool | None):
        raise _problem(f"{where}.function.strict", "must be true or false")
    return function


def _chosen(choice: Any, functions: list[dict[str, Any]]) -> dict[str, Any]:
    function = choice.get("function") if choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise _problem("tool_choice", 'must be {"type": "function", "function": {"name": ...}}')
    for known in functions:
        if known["name"] == name:
            return known
    listed = ", ".join(known["name"] for known in functions)[:200]
    raise _problem("tool_choice.function.name", f"must be one of the tools, {listed}, got {name[:64]!r}")


def _problem(field: str, problem: str) -> Problem:
    return Problem(400, f"{field}: {problem}.", param=field)
