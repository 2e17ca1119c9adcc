"""Which text is a tool call: the same pieces however a text is cut, in linear time, and nothing of a text is lost."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoma_jax.server import tool_calls
from atoma_jax.server.tool_calls import STYLES, Piece, ToolCallParser

HERMES, LLAMA = STYLES["hermes"], STYLES["llama3_json"]


def read(style: Any, *texts: str, limit: int | None = None) -> tuple[str, list[tuple[str, str]]]:
    """Content, and the calls with their arguments."""
    parser = ToolCallParser(style, limit=limit)
    pieces: list[Piece] = []
    for text in texts:
        pieces += parser.push(text)
    pieces += parser.finish()
    content = "".join(piece.text for piece in pieces if piece.kind == "content")
    calls: list[tuple[str, str]] = []
    for kind, text, index in pieces:
        if kind == "call":
            assert index == len(calls)
            calls.append((text, ""))
        elif kind == "arguments":
            calls[index] = (calls[index][0], calls[index][1] + text)
    return content, calls


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def tagged(*objects: str) -> str:
    return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects)


TRICKY = '{"a": "}\\"{", "b": [{"c": "\\\\"}, 1], "d": "</tool_call>"}'


@pytest.mark.parametrize(
    ("style", "text", "content", "calls"),
    [
        (HERMES, "Just an answer.\n", "Just an answer.\n", []),
        (HERMES, tagged(call("f", '{"x": 1}')), "", [("f", '{"x": 1}')]),
        (HERMES, "\n\n" + tagged(call("f", TRICKY), call("g", "{}")), "", [("f", TRICKY), ("g", "{}")]),
        (HERMES, "Let me see. " + tagged(call("f", "{}")), "Let me see. ", [("f", "{}")]),
        (HERMES, tagged(call("f", "{}")) + " Done.", "Done.", [("f", "{}")]),
        (HERMES, tagged('{"arguments": {"x": 1}, "name": "f"}'), "", [("f", '{"x": 1}')]),
        (HERMES, tagged('{"name": "f", "arguments": "{\\"x\\": 1}"}'), "", [("f", '{"x": 1}')]),
        (HERMES, tagged('{"name": "f"}'), "", [("f", "{}")]),
        (HERMES, tagged('{"name": "f", "arguments": {"x": 1}, "id": "7"}'), "", [("f", '{"x": 1}')]),
        (HERMES, "<tool_call>" + call("f", '{"x": [1,')[:-1], "", [("f", '{"x": [1,')]),
        (HERMES, "<tool_call>" + call("f", "{}") + "<tool_call>" + call("g", "{}"), "", [("f", "{}"), ("g", "{}")]),
        (HERMES, "<tool_call>no object</tool_call>", "<tool_call>no object</tool_call>", []),
        (HERMES, '<tool_call>{"nome": 1}</tool_call>', '<tool_call>{"nome": 1}</tool_call>', []),
        (HERMES, "a < b <tool", "a < b <tool", []),
        (HERMES, '<tool_call>{"name": "f", "arg', '<tool_call>{"name": "f", "arg', []),
        (HERMES, "  \n", "  \n", []),
        (LLAMA, call("f", '{"x": 1}', "parameters"), "", [("f", '{"x": 1}')]),
        (LLAMA, "<|python_tag|>" + call("f", "{}"), "", [("f", "{}")]),
        (LLAMA, call("f", "{}", "parameters") + "; " + call("g", "{}", "parameters"), "", [("f", "{}"), ("g", "{}")]),
        (LLAMA, " It is 7.", " It is 7.", []),
        (LLAMA, '{"answer": {"x": 7}} and more', '{"answer": {"x": 7}} and more', []),
        (LLAMA, "Look: " + call("f", "{}"), "Look: " + call("f", "{}"), []),
        (LLAMA, "", "", []),
    ],
)
def test_what_is_a_call(style: Any, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(style, text) == (content, calls)
    assert read(style, *text) == (content, calls)


def test_calls_beyond_the_limit_are_left_out() -> None:
    text = tagged(call("f", '{"x": 1}'), call("g", "{}"), '{"arguments": {}, "name": "h"}')
    assert read(HERMES, *text, limit=1) == ("", [("f", '{"x": 1}')])


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolCallParser(HERMES)
    assert parser.push('<tool_call>\n{"name": "f", "arguments": ') == []
    assert parser.push('{"city": "Par') == [Piece("call", "f"), Piece("arguments", '{"city": "Par')]
    assert parser.push('is"') == [Piece("arguments", 'is"')]
    assert parser.push("}}\n</tool") == [Piece("arguments", "}")]
    assert parser.push("_call>") == []
    assert parser.finish() == []


FRAGMENTS = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<tool",
            "{",
            "}",
            "[",
            "]",
            '"',
            "\\",
            ";",
            " ",
            "\n",
            "x",
            "é",
            "<|python_tag|>",
        ),
        *('{"name": "f", "arguments": {', '"name"', ": ", ", ", '{"name": "f", "parameters": {"a": 1}}', "1"),
    ]
)


@given(st.sampled_from([HERMES, LLAMA]), st.lists(FRAGMENTS, max_size=14), st.randoms(use_true_random=False))
def test_however_a_text_is_cut(style: Any, fragments: list[str], random: Any) -> None:
    text = "".join(fragments)
    whole = read(style, text)
    cuts = sorted(random.randint(0, len(text)) for _ in range(6))
    assert read(style, *(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))) == whole
    assert read(style, *text) == whole
    if not whole[1]:
        assert whole[0] == text  # nothing of an answer without calls is lost


@pytest.mark.parametrize(
    "unit",
    [
        *("<tool_call>", "<tool_cal", '<tool_call>{"name": "f", "arguments": {', '<tool_call>{"x', "<tool_call>{ } "),
        *("<tool_call>{", "{", "{}", " ", '\\"'),
    ],
)
@pytest.mark.parametrize("style", [HERMES, LLAMA])
def test_time_is_linear_in_hostile_text(style: Any, unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in characters that are looked at, in a text of many units that comes piece by piece."""
    looked = 0

    class Counted:
        def __init__(self, pattern: Any):
            self._pattern = pattern

        def _note(self, match: Any, text: str, at: int) -> Any:
            nonlocal looked
            looked += (len(text) if match is None else match.end()) - at
            return match

        def match(self, text: str, at: int, end: int = 1 << 30) -> Any:
            return self._note(self._pattern.match(text, at, end), text[:end], at)

        def search(self, text: str, at: int, end: int) -> Any:
            return self._note(self._pattern.search(text, at, end), text[:end], at)

    for name in ("_BREAKS", "_ENDS", "_SPACE"):
        monkeypatch.setattr(tool_calls, name, Counted(getattr(tool_calls, name)))
    monkeypatch.setattr(tool_calls, "_LONGEST_WHOLE", 500)
    count = 2000
    ends = ["}" * 10] * (count // 10)
    read(style, *[unit * 10] * (count // 10), *ends)
    read(style, unit * count + "".join(ends))
    assert looked <= 20 * count * (len(unit) + 1)


def test_a_million_characters_at_once() -> None:
    hostile = tagged(*[call("f", "{}")] * 10_000) + '<tool_call>{"a": "' + "\\" * 300_001 + "{" * 300_000
    content, calls = read(HERMES, hostile)
    assert len(calls) == 10_000
    assert json.loads(calls[-1][1]) == {}
    assert content == '<tool_call>{"a": "' + "\\" * 300_001 + "{" * 300_000
