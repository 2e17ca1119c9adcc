"""Grammars of answers that call tools: what they let pass, and that the parser finds the same calls in it."""

import json
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import numpy as np
import pytest

from atoma_jax import LLM, StructuredOutputsParams
from atoma_jax.engine.grammars import Grammars
from atoma_jax.server.tool_calls import STYLES, ToolCallParser
from atoma_jax.server.tool_grammars import held_grammar

pytest.importorskip("llguidance", reason="needs the extra `server`: llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2]}},
    "required": ["n"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
FUNCTIONS = [{"name": "go", "strict": True, "parameters": SCHEMA}, {"name": "free", "parameters": SCHEMA}]
GO = '<tool_call>\n{"name": "go", "arguments": {"n":1}}\n</tool_call>'
LLAMA = '{"name": "go", "parameters": {"n":1}}'
Matcher = Callable[[str, bool], Any]


@pytest.fixture
def matcher(llm: LLM) -> Matcher:
    """`matcher(style, single)`: at the beginning of an answer."""
    tokenizer = llm.get_tokenizer()
    grammars = Grammars(tokenizer, vocab_size=tokenizer.vocab_size)

    @cache
    def compiled(style: str, single: bool) -> Any:
        grammar = held_grammar(STYLES[style], FUNCTIONS, single=single)
        return grammars.compile(StructuredOutputsParams(grammar=grammar))

    return lambda style, single: compiled(style, single).deep_copy()


def calls_in(style: str, text: str) -> list[tuple[str, str]]:
    parser = ToolCallParser(STYLES[style])
    calls: list[tuple[str, str]] = []
    for kind, piece, _ in [*parser.push(text), *parser.finish()]:
        if kind == "call":
            calls.append((piece, ""))
        elif kind == "arguments":
            calls[-1] = (calls[-1][0], calls[-1][1] + piece)
    return calls


@pytest.mark.parametrize(
    ("style", "text", "whole", "single"),
    [
        *(("hermes", text, True, True) for text in ("", "Hello", "a <tool_ b", "</tool_call>", GO, f"Hi {GO} bye")),
        ("hermes", f"<tool_{GO}", True, True),
        ("hermes", GO.replace('"go"', '"free"').replace("1", '[1, {"x": null}]'), True, True),
        ("hermes", f"{GO}\n{GO}", True, True),  # of which the parser shows one
        *(("hermes", text, False, False) for text in ("<tool_call>", "a <tool_call> b", GO.replace("1", "3"))),
        *(("hermes", text, False, False) for text in (GO.replace("go", "stop"), GO.replace("}}", "}"))),
        ("hermes", f"{GO} <tool_call>x", False, True),
        *(
            ("llama3_json", text, True, True)
            for text in ("", " ", "Hello {", "\x1cHi", LLAMA, f" \n{LLAMA}", f"A{LLAMA}")
        ),
        ("llama3_json", f"{LLAMA}; {LLAMA}", True, False),
        *(("llama3_json", text, False, False) for text in ("{", "  {", "\x1c{", LLAMA.replace("1", "3"), f"{LLAMA} x")),
        *(("llama3_json", text, False, False) for text in ("<|python_tag|>{", " <|python_tag|>x")),
    ],
)
def test_what_passes(matcher: Matcher, llm: LLM, style: str, text: str, whole: bool, single: bool) -> None:
    """`single`: the same where one call is allowed."""
    ids = llm.get_tokenizer().encode(text, add_special_tokens=False)
    for one_call, expected in ((False, whole), (True, single)):
        follower = matcher(style, one_call)
        taken = follower.try_consume_tokens(ids)
        assert (taken == len(ids) and follower.is_accepting()) == expected, (one_call, text[:taken])


@pytest.mark.parametrize("style", ["hermes", "llama3_json"])
def test_every_call_that_the_parser_finds_fits(matcher: Matcher, llm: LLM, style: str) -> None:
    """Random answers: a character of what a call looks like, or any other that may follow."""
    tokenizer, random = llm.get_tokenizer(), Random(0)
    texts = [*(each.replace("go", name) for each in (GO, LLAMA) for name in ("go", "free")), f"Hi {GO}\n{GO}", "{[]}"]
    script = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    found: list[tuple[str, str]] = []
    for _ in range(60):
        follower, wanted, ids = matcher(style, False), random.choice(script), list[int]()
        while len(ids) < 150 and not follower.is_stopped():
            mask = np.frombuffer(follower.compute_bitmask(), np.uint32)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            token = wanted[len(ids)] if len(ids) < len(wanted) and random.random() < 0.99 else None
            if token not in allowed:
                token = int(random.choice(allowed.tolist()))
            if token in tokenizer.eos_token_ids:
                break
            assert follower.consume_token(token)
            ids.append(token)
        if follower.is_accepting():
            found += calls_in(style, tokenizer.decode(ids))
    assert {name for name, _ in found} == {"go", "free"}
    assert all(json.loads(arguments) in ({"n": 1}, {"n": 2}) for name, arguments in found if name == "go")
    assert all(isinstance(json.loads(arguments), dict) for name, arguments in found if name == "free")
