"""From `response_format` and `structured_outputs` of a request to what the engine is asked to hold an answer to."""

from typing import Any

from atoma_jax import StructuredOutputsParams
from atoma_jax.server.errors import Problem
from atoma_jax.server.schemas import SamplingRequest

_KEYS = (
    *("json", "regex", "choice", "grammar", "json_object", "disable_any_whitespace"),
    *("disable_additional_properties", "whitespace_pattern", "structural_tag"),
)


def constraint_of(request: SamplingRequest) -> StructuredOutputsParams | None:
    """What the answer's text must look like; None: anything.

    Raises:
        Problem: a field is unknown or of a wrong type, or two fields ask for something.
        UserError: a constraint is outside its limits.
    """
    by_format, given = _of_response_format(request.response_format), request.structured_outputs
    if not given:
        return by_format
    if by_format is not None:
        raise _problem("structured_outputs", "contradicts response_format: give one of the two")
    for name in given:
        if name not in _KEYS:
            raise _problem(f"structured_outputs.{name[:60]}", f"is unknown; there are {', '.join(_KEYS)}")
    return StructuredOutputsParams(**{name: value for name, value in given.items() if value is not None})


def _of_response_format(wanted: dict[str, Any] | None) -> StructuredOutputsParams | None:
    kind = (wanted or {}).get("type", "text")
    if wanted is None or kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True, named="response_format")
    if kind != "json_schema":
        known = "text, json_object or json_schema"
        raise _problem("response_format.type", f"must be {known}, got {kind!r}"[:300])
    described = wanted.get("json_schema")
    if not isinstance(described, dict):
        raise _problem("response_format.json_schema", "must be an object with the key schema")
    schema: Any = described.get("schema")
    if not isinstance(schema, dict):
        raise _problem("response_format.json_schema.schema", "must be a JSON schema, an object")
    return StructuredOutputsParams(json=schema, named="response_format.json_schema.schema")


def _problem(field: str, problem: str) -> Problem:
    return Problem(400, f"{field}: {problem}.", param=field)
