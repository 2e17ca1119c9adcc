"""Filters and string operations of chat templates that could make more text than they are given, each bounded.

Owns how large a result will be, before it is made. Which filters exist besides is `template_sandbox.py`'s.
"""

import html
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import Environment, Undefined
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter

from atoma_jax.tokenizer.template_budget import Budget

_MAX_WIDTH_DIGITS = 3  # of a width or precision in a format
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]{0,1000}?(\*|\d{4})")
_WIDE_BRACES = re.compile(r"\{[^{}]*(\{|\d{4})")
_MAX_INDENT = 16
_MAX_TRIM = 256  # characters to strip: the time is their number times the text's length


def joined(budget: Budget, separator: str, parts: list[Any]) -> str:
    """`separator.join(parts)`, charged before it is made."""
    for part in parts:
        if not isinstance(part, str):
            raise TypeError(f"join() takes strings, not {type(part).__name__}")
    size = sum(len(part) for part in parts) + len(separator) * len(parts)
    budget.check_value(size)
    budget.make(size + 2 * len(parts))
    return separator.join(parts)


def check_replace(budget: Budget, text: str, old: Any, new: Any) -> None:
    """Refuses a replacement whose result is too long."""
    if isinstance(old, str) and isinstance(new, str):
        budget.check_value(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def check_format_percent(budget: Budget, form: str, values: Any) -> None:
    """Refuses `form % values` if widths or repetitions may make it too long."""
    if _WIDE_PERCENT.search(form):
        raise SecurityError(f"a format's width may have at most {_MAX_WIDTH_DIGITS} digits")
    budget.check_value(len(form) + form.count("%") * (10**_MAX_WIDTH_DIGITS + budget.written(values)))


def check_format_braces(budget: Budget, form: str, values: list[Any]) -> None:
    """Refuses `form.format(*values)` if widths or repetitions may make it too long."""
    if _WIDE_BRACES.search(form):
        raise SecurityError(f"a format's width may have at most {_MAX_WIDTH_DIGITS} digits and no field of its own")
    budget.check_value(len(form) + form.count("{") * (10**_MAX_WIDTH_DIGITS + budget.written(values)))


class BoundedFilters:
    """The filters of one rendering, and its `dict()`."""

    def __init__(self, environment: Environment, budget: Budget, as_text: Callable[[Any], str]):
        """`as_text` writes a value out, within the budget; `environment` looks attributes up."""
        self._environment = environment
        self._budget = budget
        self._as_text = as_text

    def by_name(self) -> dict[str, Callable[..., Any]]:
        """The filters as templates call them."""
        return {
            "join": self.join,
            "replace": self.replace,
            "indent": self.indent,
            "tojson": self.tojson,
            "trim": self.trim,
            "list": self.as_list,
            "sum": self.total,
            "format": self.percent_format,
            "string": self._as_text,
            "safe": self._as_text,  # nothing is escaped here, so nothing needs to be marked as safe
            "escape": self.escape,
            "e": self.escape,
        }

    def make_dict(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """The global `dict`: the class would give away its other constructors."""
        made = dict(*args, **kwargs)
        self._budget.make_value(made)
        return made

    def join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        """The items as text, `d` between them."""
        if attribute is not None:
            value = map(make_attrgetter(self._environment, attribute), value)
        return joined(self._budget, self._as_text(d), [self._as_text(item) for item in value])

    def replace(self, value: Any, old: str, new: str, count: int = -1) -> str:
        """The text with `old` replaced, at most `count` times."""
        text = self._as_text(value)
        check_replace(self._budget, text, old, new)
        return text.replace(old, new, count)

    def indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        """The text with a margin before its lines but the first, unless `first`, and empty ones, unless `blank`."""
        margin = width if isinstance(width, str) else " " * min(max(width, 0), _MAX_INDENT + 1)
        if len(margin) > _MAX_INDENT:
            raise SecurityError(f"indent() takes at most {_MAX_INDENT} characters")
        lines = self._as_text(value).splitlines()
        kept = [margin + line if (line or blank) and (i or first) else line for i, line in enumerate(lines)]
        return joined(self._budget, "\n", kept)

    def tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON that is not escaped for HTML, with the options that `transformers` gives it."""
        if isinstance(value, Undefined):
            raise TypeError("an undefined value has no JSON form")
        self._budget.step(1 + self._budget.written(value) // 16)
        if indent is not None and not 0 <= indent <= _MAX_INDENT:
            raise SecurityError(f"tojson() takes an indent of at most {_MAX_INDENT}")
        if separators is not None and sum(map(len, separators)) > _MAX_INDENT:
            raise SecurityError(f"the separators of tojson() may have at most {_MAX_INDENT} characters")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        if indent is None:
            return encoder.encode(value)  # at most six times the value, which was measured
        chunks: list[str] = []
        for chunk in encoder.iterencode(value):
            self._budget.make(len(chunk))  # deep nesting times its margin is far more than the value itself
            chunks.append(chunk)
        return "".join(chunks)

    def trim(self, value: Any, chars: str | None = None) -> str:
        """The text without `chars`, white space as a rule, at its ends."""
        if chars is not None and len(chars) > _MAX_TRIM:
            raise SecurityError(f"trim() takes at most {_MAX_TRIM} characters")
        return self._as_text(value).strip(chars)

    def as_list(self, value: Iterable[Any]) -> list[Any]:
        """The items of anything that can be looped over."""
        if isinstance(value, str):
            self._budget.make(20 * len(value))  # a string object a character
        return list(value)

    def total(self, value: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
        """The sum of numbers."""
        if not isinstance(start, (int, float)):
            raise TypeError("sum() adds numbers")  # lists would be copied over and over
        if attribute is not None:
            value = map(make_attrgetter(self._environment, attribute), value)
        return sum(value, start)

    def percent_format(self, value: str, *args: Any, **kwargs: Any) -> str:
        """`value % args`."""
        values = kwargs or args
        check_format_percent(self._budget, value, values)
        return value % values

    def escape(self, value: Any) -> str:
        """The text for HTML."""
        return html.escape(self._as_text(value))
