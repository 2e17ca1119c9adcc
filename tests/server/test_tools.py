"""Tools over HTTP: what the template sees, calls that must be made, calls that a model makes, and their streams."""

import json
from typing import Any

import pytest

from tests.server.conftest import Serve, Served

pytest.importorskip("llguidance", reason="needs the extra `server`: llguidance")

CHAT = "/v1/chat/completions"
# Shows everything that a template may see of tools.
TEMPLATE = (
    "{% if tools %}<{% for tool in tools %}{{ tool.function.name }} {% endfor %}>{% endif %}"
    "{% for message in messages %}{{ message.role[0] }}:"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}"
    "{{ call.function.name }}({% for key, value in call.function.arguments.items() %}{{ key }}={{ value }}{% endfor %})"
    "{% endfor %}{% else %}{{ message.content }}{% endif %};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "go",
            "description": "Goes.",
            "parameters": {
                "type": "object",
                "properties": {"n": {"enum": [1, 2]}},
                "required": ["n"],
                "additionalProperties": False,
                "x-guidance": {"whitespace_flexible": False},
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Go"}],
    "tools": TOOLS,
    "temperature": 1.0,
    "seed": 3,
    "max_tokens": 70,
}
# A model of random weights writes a call where it can write nothing else.
WRITES = '<tool_call>\n{"name": "go", "arguments": {"n": 1}}\n</tool_call>'


@pytest.fixture(params=["hermes", "llama3_json"])
def able(request: pytest.FixtureRequest, serve: Serve) -> Served:
    """A server for either style."""
    return serve(template=TEMPLATE, tool_call_parser=request.param, enable_auto_tool_choice=True)


def message_of(server: Served, **changes: Any) -> tuple[dict[str, Any], str]:
    """The message and the finish reason; the stream comes to the same."""
    body = {**ASK, **changes}
    response = server.post(CHAT, body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    message = choice["message"]
    streamed: dict[str, Any] = {"content": "", "calls": {}, "reason": None}
    lines = server.post(CHAT, {**body, "stream": True}).text.split("\n\n")
    for line in lines:
        if line.startswith("data: {"):
            (chunk,) = json.loads(line[6:])["choices"]
            streamed["content"] += chunk["delta"].get("content") or ""
            streamed["reason"] = chunk["finish_reason"] or streamed["reason"]
            for part in chunk["delta"].get("tool_calls", ()):
                if "id" in part:
                    assert part["type"] == "function"
                    streamed["calls"][part["index"]] = {"name": part["function"]["name"], "arguments": ""}
                streamed["calls"][part["index"]]["arguments"] += part["function"]["arguments"]
    assert streamed["content"] == (message["content"] or "")
    assert list(streamed["calls"].values()) == [call["function"] for call in message["tool_calls"]]
    assert streamed["reason"] == choice["finish_reason"]
    return message, choice["finish_reason"]


def test_a_named_function_is_called(able: Served) -> None:
    message, reason = message_of(able, tool_choice={"type": "function", "function": {"name": "go"}})
    (call,) = message["tool_calls"]
    assert message["content"] is None
    assert call["function"]["name"] == "go"
    assert json.loads(call["function"]["arguments"])["n"] in (1, 2)
    assert call["id"].startswith("call_")
    assert reason == "stop"  # as from OpenAI, where the client knows what it asked for


@pytest.mark.parametrize("parallel", [None, False])
def test_some_function_is_called(able: Served, parallel: bool | None) -> None:
    message, reason = message_of(able, tool_choice="required", parallel_tool_calls=parallel)
    names = [call["function"]["name"] for call in message["tool_calls"]]
    assert set(names) <= {"go", "stop"}
    assert names
    assert reason in ("tool_calls", "length")
    if parallel is False:
        assert len(names) == 1


def test_a_call_that_the_model_makes(serve: Serve) -> None:
    server = serve(template=TEMPLATE, tool_call_parser="hermes", enable_auto_tool_choice=True)
    message, reason = message_of(server, structured_outputs={"choice": ["Well. " + WRITES]}, max_tokens=90)
    assert message["content"] == "Well. "
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "go", "arguments": '{"n": 1}'}]
    assert reason == "tool_calls"


def test_a_call_of_a_strict_function_is_held_to_its_schema_once_it_begins(serve: Serve) -> None:
    """The model is made to begin with an object, which is a call in Llama's style; all the rest is its own."""
    server = serve(template=TEMPLATE, tool_call_parser="llama3_json", enable_auto_tool_choice=True)
    (opening,) = server.post("/tokenize", {"prompt": "{", "add_special_tokens": False}).json()["tokens"]
    strict = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
    begins: dict[str, Any] = {"logit_bias": {str(opening): 100}, "parallel_tool_calls": False}
    message, _ = message_of(server, tools=TOOLS, **begins, max_tokens=5)
    assert (message["content"], message["tool_calls"]) == ("{" * 5, [])
    message, reason = message_of(server, tools=[strict[0]], **begins)
    (call,) = message["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])["n"] in (1, 2)) == ("go", True)
    assert (message["content"], reason) == (None, "tool_calls")
    message, _ = message_of(server, tools=strict, logit_bias={str(opening): -100}, max_tokens=5)
    assert message["content"]
    assert message["tool_calls"] == []


def test_an_answer_without_a_call(able: Served) -> None:
    message, reason = message_of(able, structured_outputs={"choice": ["No need."]}, tool_choice="auto")
    assert (message["content"], message["tool_calls"], reason) == ("No need.", [], "stop")
    message, _ = message_of(able, structured_outputs={"choice": [WRITES]}, tool_choice="none", max_tokens=90)
    assert (message["content"], message["tool_calls"]) == (WRITES, [])


def test_what_the_template_sees(able: Served) -> None:
    messages = [
        {"role": "user", "content": "Go"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "go", "arguments": '{"n": 1}'}},
                {"id": "call_2", "type": "function", "function": {"name": "stop", "arguments": ""}},
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "gone"}]},
    ]
    tokens = able.post("/tokenize", {"messages": messages, "tools": TOOLS}).json()["tokens"]
    text = able.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert text == "<go stop >u:Go;a:go(n=1)stop();t:gone;a:"
    asked = able.post(CHAT, {**ASK, "messages": messages, "max_tokens": 1, "tool_choice": "none"}).json()
    assert asked["usage"]["prompt_tokens"] == len(tokens)


@pytest.mark.parametrize(
    ("changes", "param", "problem"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", '"function"'),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "must be an object"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "called alike"),
        ({"tools": [TOOLS[1]] * 200}, "tools", "at most 128"),
        ({"tool_choice": "perhaps"}, "tool_choice", "none, auto, required"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "must be"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name", "go, stop"),
        ({"tool_choice": "required", "tools": None}, "tool_choice", "needs tools"),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
            "response_format and structured_outputs contradict",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
            },
            "tools",
            "not",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
            "JSON object",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]},
            "tools[0].function.strict",
            "true or false",
        ),
        (
            {
                "tools": [TOOLS[1], {"type": "function", "function": {"name": "f", "strict": True}}],
                "response_format": {"type": "json_object"},
            },
            "tools[1].function.strict",
            "response_format and structured_outputs contradict",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": 7}]}, "messages[0].tool_calls", "must be a list"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_is_refused_by_name(serve: Serve, changes: dict[str, Any], param: str, problem: str) -> None:
    server = serve(template=TEMPLATE, tool_call_parser="hermes", enable_auto_tool_choice=True)
    error = server.refused(CHAT, {**ASK, **changes})
    assert error["param"] == param
    assert problem in error["message"]


def test_what_the_server_must_be_started_with(server: Served, serve: Serve) -> None:
    error = server.refused(CHAT, ASK)
    assert error["param"] == "tool_choice"
    assert "--enable-auto-tool-choice and --tool-call-parser" in error["message"]
    error = server.refused(CHAT, {**ASK, "tool_choice": "required"})
    assert "chat template does not take tools" in error["message"]
    message, _ = message_of(serve(template=TEMPLATE), tool_choice="required", parallel_tool_calls=False)
    assert len(message["tool_calls"]) == 1
