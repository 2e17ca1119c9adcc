"""Grammars of answers that call tools, in llguidance's dialect of Lark.

A call is written as `tool_calls.py` reads it: whatever a grammar here lets pass, the parser there takes for the same
calls, with arguments that fit the schemas.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from atoma_jax.server.tool_calls import PYTHON_TAG, ToolStyle

_ANYTHING = "(?s:.*)"
_SPACE = r"\s\x1c-\x1f"  # inside brackets; what Python's `\s` means


def forced_grammar(style: ToolStyle, functions: Sequence[Mapping[str, Any]], *, single: bool) -> str:
    """One call of one of the functions, or several, and nothing else. Each is held to its schema."""
    many = "" if single else f" ({json.dumps(style.between)} call)*"
    opens = style.opens and style.opens + "\n"
    schemas = [_parameters(function) for function in functions]
    return "\n".join([f"start: call{many}", *_calls(style, functions, schemas, opens)])


def held_grammar(style: ToolStyle, functions: Sequence[Mapping[str, Any]], *, single: bool) -> str:
    """Any text, in which whatever begins a call must go on as one of one of the functions. The arguments of those that
    are `strict` are held to their schemas, those of others are any object.

    In a style with tags the tag begins a call; a lexeme that is lazy ends with the first of them, so that no free text
    holds one. In a style without, an object at the beginning of the answer is one.
    """
    schemas = [_parameters(function) if function.get("strict") else {"type": "object"} for function in functions]
    if style.opens:
        return "\n".join([
            f"start: call{'?' if single else '*'} text",
            f"text: /{_ANYTHING}/",
            f"opening[lazy]: /{_ANYTHING}/ {json.dumps(style.opens)}",
            *_calls(style, functions, schemas, "\n", before="opening "),
        ])  # fmt: skip
    many = "" if single else f" ({json.dumps(style.between)} call)*"
    return "\n".join([
        f"start: TEXT | SPACE? call{many}",
        f"TEXT: /[{_SPACE}]*([^{{{_SPACE}]{_ANYTHING})?/ & ~/[{_SPACE}]*{re.escape(PYTHON_TAG)}{_ANYTHING}/",
        f"SPACE: /[{_SPACE}]+/",
        *_calls(style, functions, schemas, ""),
    ])  # fmt: skip


def _calls(
    style: ToolStyle,
    functions: Sequence[Mapping[str, Any]],
    schemas: Sequence[Mapping[str, Any]],
    opens: str,
    before: str = "",
) -> list[str]:
    """The rule `call`, behind the rule `before` and the text `opens`, and those below it."""
    lines = [f"call: {before}({' | '.join(f'call_{index}' for index in range(len(functions)))})"]
    closes = "}" + (style.closes and "\n" + style.closes)
    for index, (function, schema) in enumerate(zip(functions, schemas, strict=True)):
        head = f'{opens}{{"name": {json.dumps(function["name"])}, "{style.key}": '
        lines.append(f"call_{index}: {json.dumps(head)} arguments_{index} {json.dumps(closes)}")
        lines.append(f"arguments_{index}: %json {json.dumps(schema)}")
    return lines


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object in any case."""
    return {"type": "object", **(function.get("parameters") or {"additionalProperties": False})}
