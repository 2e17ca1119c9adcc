"""What an answer's text must look like: one of JSON, a JSON schema, a regex, a choice or a grammar. Names are vLLM's.

Owns what can be checked without a model: that there is one constraint, of the right type and within the limits of size.
Whether it is a valid schema, regex or grammar is found out where it is compiled (`engine/grammars.py`).
"""

import json as json_module
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, no_type_check

from atoma_jax.errors import ParameterError

MAX_CHARS = 1 << 17  # of a schema, regex or grammar, or of all choices together
MAX_CHOICES = 4096
_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@no_type_check  # for the run-time checks of our tests: it refuses wrong types itself, in its own words
@dataclass(frozen=True, slots=True, init=False)
class StructuredOutputsParams:
    """One constraint on the whole text of an answer. Immutable.

    Attributes:
        json: a JSON schema, as text.
        regex: a regular expression that the whole text matches: without look-around and back-references.
        choice: texts, of which the answer is one.
        grammar: a context-free grammar in llguidance's dialect of Lark.
        json_object: any JSON object.
        disable_any_whitespace: no spaces and line breaks between the parts of JSON.
        disable_additional_properties: objects of the schema have only the properties that it names.
        whitespace_pattern: a regex of what may stand between the parts of JSON.
        named: what errors call it: the field of a request that it comes from.
    """

    json: str | None
    regex: str | None
    choice: tuple[str, ...] | None
    grammar: str | None
    json_object: bool
    disable_any_whitespace: bool
    disable_additional_properties: bool
    whitespace_pattern: str | None
    named: str = field(compare=False, repr=False)

    def __init__(
        self,
        json: str | Mapping[str, Any] | None = None,
        regex: str | None = None,
        choice: Iterable[str] | None = None,
        grammar: str | None = None,
        json_object: bool | None = None,
        disable_any_whitespace: bool = False,
        disable_additional_properties: bool = False,
        whitespace_pattern: str | None = None,
        structural_tag: None = None,
        *,
        named: str = "structured_outputs",
    ):
        """Checks and stores the constraint.

        Raises:
            ParameterError: there is none or more than one, it has the wrong type, or it is too long.
        """
        given = {"json": json, "regex": regex, "choice": choice, "grammar": grammar, "json_object": json_object or None}
        kinds = [kind for kind in _KINDS if given[kind] is not None]
        if structural_tag is not None:
            raise _error(named, "structural_tag", structural_tag, "is not supported by this engine: leave it out")
        if len(kinds) != 1:
            shown = ", ".join(kinds) or "none"
            problem = f"{named} must hold exactly one of {', '.join(_KINDS)}, got {shown}."
            raise ParameterError(named, shown, problem)
        flags: dict[str, Any] = {"json_object": json_object or False, "disable_any_whitespace": disable_any_whitespace}
        flags["disable_additional_properties"] = disable_additional_properties
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise _error(named, name, value, "must be true or false")
        if whitespace_pattern is not None:
            _check_text(named, "whitespace_pattern", whitespace_pattern)
        if json is not None:
            json = _schema(named, json, closed=disable_additional_properties)
        for name, value in (("json", json), ("regex", regex), ("grammar", grammar)):
            if value is not None:
                _check_text(named, name, value)
        _check_meaning(named, kinds[0], flags, whitespace_pattern)
        for name, value in {
            **flags,
            "json": json,
            "regex": regex,
            "choice": None if choice is None else _choices(named, choice),
            "grammar": grammar,
            "whitespace_pattern": whitespace_pattern,
            "named": named,
        }.items():
            object.__setattr__(self, name, value)  # frozen: this is the constructor's one way in

    @property
    def kind(self) -> str:
        """The name of the one constraint."""
        return next(kind for kind in _KINDS if getattr(self, kind))

    @property
    def field(self) -> str:
        """The constraint as errors call it."""
        return f"{self.named}.{self.kind}" if self.named == "structured_outputs" else self.named


def _schema(named: str, value: Any, *, closed: bool) -> str:
    """A schema as text that is JSON. Texts are read and written again, so that schemas which are equal read alike."""
    if isinstance(value, str):
        _check_text(named, "json", value)
    elif not isinstance(value, Mapping):
        raise _error(named, "json", value, "must be a JSON schema: an object, or its text")
    try:
        schema = json_module.loads(value) if isinstance(value, str) else value
        return json_module.dumps(_closed(schema) if closed else schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _error(named, "json", value, f"is no valid JSON: {error}") from None
    except RecursionError:
        raise _error(named, "json", type(value).__name__, "is nested too deep") from None


def _closed(schema: Any) -> Any:
    """The schema with objects that have no other properties than those it names."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    copy = {key: value if key in ("enum", "const", "default") else _closed(value) for key, value in schema.items()}
    if isinstance(copy.get("properties"), dict) or copy.get("type") == "object":
        copy.setdefault("additionalProperties", False)
    return copy


def _check_meaning(named: str, kind: str, flags: Mapping[str, bool], whitespace_pattern: str | None) -> None:
    """No setting without effect."""
    if kind not in ("json", "json_object") and (flags["disable_any_whitespace"] or whitespace_pattern is not None):
        name = "disable_any_whitespace" if flags["disable_any_whitespace"] else "whitespace_pattern"
        raise _error(named, name, kind, "is for json and json_object alone")
    if flags["disable_any_whitespace"] and whitespace_pattern is not None:
        raise _error(named, "whitespace_pattern", whitespace_pattern, "contradicts disable_any_whitespace")
    if flags["disable_additional_properties"] and kind != "json":
        raise _error(named, "disable_additional_properties", kind, "is for json alone")


def _choices(named: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise _error(named, "choice", value, "must be a list of texts")
    choices = tuple(dict.fromkeys(value))
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise _error(named, "choice", len(choices), f"must hold 1 to {MAX_CHOICES} texts")
    for choice in choices:
        _check_text(named, "choice", choice)
    total = sum(map(len, choices))
    if total > MAX_CHARS:
        raise _error(named, "choice", total, f"may have at most {MAX_CHARS} characters in all")
    return choices


def _check_text(named: str, name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _error(named, name, value, f"must be a string, not {type(value).__name__}")
    if not value:
        raise _error(named, name, value, "must not be empty")
    if len(value) > MAX_CHARS:
        raise _error(named, name, len(value), f"may have at most {MAX_CHARS} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _error(named, name, "a lone surrogate", "must be valid Unicode") from None


def _error(named: str, name: str, value: Any, rule: str) -> ParameterError:
    shown = repr(value)
    if len(shown) > 120:
        shown = shown[:117] + "..."
    field_name = f"{named}.{name}" if named == "structured_outputs" else named
    return ParameterError(field_name, value, f"{field_name} {rule}, got {shown}.")
