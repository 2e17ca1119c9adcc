"""`response_format` and `structured_outputs` over HTTP, for both kinds of answers, and what is wrong with them."""

import asyncio
import json
import threading
from typing import Any

import pytest

from atoma_jax.engine import async_engine
from tests.server.conftest import Served

pytest.importorskip("llguidance", reason="needs the extra `server`: llguidance")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "é"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}
COMPACT = {**SCHEMA, "x-guidance": {"whitespace_flexible": False}}
SEEDED: dict[str, Any] = {"max_tokens": 60, "temperature": 1, "seed": 1}


def test_a_schema_as_openai_spells_it(server: Served) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": COMPACT}}
    (choice,) = server.chat("Hi", response_format=wanted, **SEEDED)["choices"]
    assert json.loads(choice["message"]["content"]).keys() == {"ok", "kind"}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ({"json": json.dumps(SCHEMA), "disable_any_whitespace": True}, r'{"ok":(true|false),"kind":"(a|é)"}'),
        ({"regex": "[ab]{4}"}, "[ab]{4}"),
        ({"choice": ["left", "right"], "regex": None}, "left|right"),
        ({"grammar": 'start: "x" | "y"'}, "x|y"),
        ({"json_object": True, "whitespace_pattern": "[ ]?"}, r"\{.*"),
    ],
)
def test_all_kinds_of_vllm(server: Served, constraint: dict[str, Any], expected: str) -> None:
    import re

    (choice,) = server.complete(prompt="Say", structured_outputs=constraint, **SEEDED)["choices"]
    assert re.fullmatch(expected, choice["text"], re.DOTALL)


def test_each_prompt_and_sample_of_a_stream(server: Served) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "stream": True, "structured_outputs": {"choice": ["left", "right"]}, **SEEDED}
    lines = server.post(COMPLETIONS, body).text.split("\n\n")
    texts = dict.fromkeys(range(4), "")
    for line in lines:
        if line.startswith("data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            texts[choice["index"]] += choice["text"]
    assert set(texts.values()) <= {"left", "right"}
    assert len(texts) == 4


@pytest.mark.parametrize(
    ("body", "param", "problem"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "with the key schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format.json_schema.schema",
            "not",
        ),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"guess": 1}}, "structured_outputs.guess", "is unknown"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
        ({"structured_outputs": {"regex": 7}}, "structured_outputs.regex", "must be a string"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "1 to 4096"),
        ({"structured_outputs": {"regex": "a" * 200_000}}, "structured_outputs.regex", "at most 131072"),
        (
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
            "for json",
        ),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "contradicts structured_outputs"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "contradicts response_format",
        ),
        ({"structured_outputs": {"choice": ["zz"]}, "allowed_token_ids": [5]}, "structured_outputs", "leave no token"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_is_refused_by_name(server: Served, body: dict[str, Any], param: str, problem: str) -> None:
    error = server.refused(COMPLETIONS, {"prompt": "a", **body})
    assert error["param"] == param
    assert problem in error["message"]


def test_a_grammar_that_takes_too_long_is_refused_while_others_are_served(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(async_engine, "COMPILE_SECONDS", 0.2)
    monkeypatch.setattr(server.engine.grammars, "prepare", lambda: gate.wait(20))
    server.engine.grammars._own = object()

    async def main() -> None:
        async with server.client() as client:
            body = {"prompt": "a", "structured_outputs": {"regex": "a"}}
            asked = asyncio.create_task(client.post(COMPLETIONS, json=body))
            other = await client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2})
            assert other.status_code == 200
            assert not asked.done()
            error = (await asked).json()["error"]
            assert (error["code"], error["param"]) == (400, "structured_outputs.regex")
            assert "within 0.2 s" in error["message"]

    asyncio.run(main())
    gate.set()
    server.engine.grammars._own = None
