"""`/v1/chat/completions` and the small endpoints: the shapes that clients read."""

import asyncio
from typing import Any

import pytest

from atoma_jax import LLM, SamplingParams, UserError, __version__
from tests.server.conftest import Serve, Served
from tests.server.test_completions import stream

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 5, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"


def test_an_answer_has_every_key_that_clients_read(server: Served, llm: LLM) -> None:
    body = server.chat("Hi", **GREEDY)
    reference = llm.chat(MESSAGES, SamplingParams(**GREEDY), use_tqdm=False)[0]
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    text = reference.outputs[0].text
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": text, "tool_calls": [], "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    assert body["usage"]["prompt_tokens"] == len(reference.prompt_token_ids)


def test_text_parts_are_text(server: Served) -> None:
    parts = [{"type": "text", "text": "Hi"}]
    assert server.chat(parts, **GREEDY)["choices"] == server.chat("Hi", **GREEDY)["choices"]


def test_max_completion_tokens_wins_and_the_default_is_what_fits(server: Served) -> None:
    ask: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    assert server.chat("Hi", max_tokens=2, max_completion_tokens=3, **ask)["usage"]["completion_tokens"] == 3
    assert server.chat("Hi", **ask)["usage"]["total_tokens"] == 96  # the model's length


def test_a_stream_begins_with_the_role_and_then_has_an_event_a_token(server: Served) -> None:
    whole = server.chat("Hi", n=2, seed=1, temperature=1, max_tokens=5, ignore_eos=True)
    chunks = stream(
        server,
        CHAT,
        messages=MESSAGES,
        stream_options={"include_usage": True},
        n=2,
        seed=1,
        temperature=1,
        max_tokens=5,
        ignore_eos=True,
    )
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"] | {
        "prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]
    }
    for index in range(2):
        choices = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert len(choices) == 1 + 5
        text = "".join(choice["delta"]["content"] for choice in choices)
        assert text == whole["choices"][index]["message"]["content"]
        assert [choice["finish_reason"] for choice in choices] == [None] * 5 + ["length"]


def test_logprobs(server: Served) -> None:
    (choice,) = server.chat("Hi", logprobs=True, top_logprobs=2, **GREEDY)["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 5
    for entry in content:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0] == {name: entry[name] for name in ("token", "logprob", "bytes")}
        assert entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]
    streamed = stream(server, CHAT, messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY)
    assert [chunk["choices"][0]["logprobs"]["content"][0] for chunk in streamed[1:]] == content
    assert server.chat("Hi", logprobs=True, **GREEDY)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    error = server.refused(CHAT, {"messages": MESSAGES, "top_logprobs": 2})
    assert error["message"] == "when using `top_logprobs`, `logprobs` must be set to true."


def test_the_last_message_can_be_gone_on_with(server: Served) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Well"}]
    ask = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False, **GREEDY}
    tokens = server.post("/tokenize", {name: ask[name] for name in list(ask)[:3]}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json()["prompt"].endswith("assistant\nWell")
    body = server.post(CHAT, {**ask, "echo": True}).json()
    assert body["usage"]["prompt_tokens"] == len(tokens)
    assert body["choices"][0]["message"]["content"].startswith("Well")
    error = server.refused(CHAT, {"messages": messages, "continue_final_message": True})
    assert error["param"] == "continue_final_message"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_choice", "required"),
        ("logprob_token_ids", [1]),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", {"messages": []}),
        ("chat_template_kwargs", {"tokenize": True}),
        ("reasoning_effort", "high"),
        ("documents", [{"text": "x"}]),
    ],
)
def test_what_would_have_no_effect_is_refused_by_name(server: Served, field: str, value: Any) -> None:
    error = server.refused(CHAT, {"messages": MESSAGES, field: value})
    assert field.split("_kwargs")[0] in f"{error['param']} {error['message']}"
    assert error["type"] == "BadRequestError"


def test_what_asks_for_nothing_is_taken(server: Served) -> None:
    ask = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "parallel_tool_calls": True}
    server.chat("Hi", **ask, **GREEDY)


def test_models(serve: Serve) -> None:
    server = serve(served_model_name=("first", "second"))
    listed = server.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["first", "second"]
    keys = {"id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"}
    assert all(set(card) == keys for card in listed["data"])
    assert listed["data"][0]["max_model_len"] == 96
    assert server.complete(prompt="a", model="second", max_tokens=1)["model"] == "second"
    assert server.complete(prompt="a", max_tokens=1)["model"] == "first"
    error = server.refused("/v1/completions", {"prompt": "a", "model": "third"}, 404)
    assert "first, second" in error["message"]
    assert error["param"] == "model"


def test_tokens_there_and_back(server: Served, llm: LLM) -> None:
    answer = server.post("/tokenize", {"prompt": "The the", "return_token_strs": True}).json()
    ids = llm.get_tokenizer().encode("The the")
    assert answer["tokens"] == ids
    assert (answer["count"], answer["max_model_len"], len(answer["token_strs"])) == (len(ids), 96, len(ids))
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": "The the"}
    chat = server.post("/tokenize", {"messages": MESSAGES, "add_generation_prompt": True}).json()
    assert chat["tokens"] == llm.render(MESSAGES)["prompt_token_ids"]
    server.refused("/tokenize", {})
    server.refused("/detokenize", {"tokens": [10**6]})
    server.refused("/detokenize", {"tokens": [-1]})


def test_what_tokenizers_of_clients_need(server: Served) -> None:
    info = server.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>"
    assert info["bos_token"] == "<|endoftext|>"
    assert "pad_token" in info
    assert "messages" in info["chat_template"]


def test_small_endpoints(server: Served) -> None:
    assert server.get("/version").json() == {"version": __version__}
    assert server.get("/load").json() == {"server_load": 0}
    assert server.get("/docs").status_code == 200
    assert server.get("/openapi.json").status_code == 200
    for probe in ("/health", "/ping", "/ready"):
        response = server.get(probe)
        assert (response.status_code, response.content) == (200, b"")
    assert server.post("/start_profile").json()["error"]["param"] == "profile_dir"


def test_a_reset_forgets_prefixes(server: Served) -> None:
    ids = list(range(10, 43))
    server.complete(prompt=ids, **GREEDY)
    assert server.post("/reset_prefix_cache").status_code == 200
    assert server.complete(prompt=ids, **GREEDY)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)])
def test_wrong_paths_have_the_shape_of_errors_too(server: Served, method: str, path: str, status: int) -> None:
    response = server.call(method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == status


BOMB = "{% for i in range(1000) %}{% for j in range(1000) %}{{ i * j }}{% endfor %}{% endfor %}"


def test_a_template_that_never_ends_is_ended_while_others_are_served(serve: Serve) -> None:
    server = serve(template=BOMB)

    async def main() -> None:
        async with server.client() as client:
            bomb = asyncio.create_task(client.post(CHAT, json={"messages": MESSAGES}))
            await asyncio.sleep(0.02)
            for _ in range(5):
                assert (await client.get("/health")).status_code == 200
            assert not bomb.done()
            response = await bomb
        assert response.status_code == 400
        assert "rendering takes too many" in response.json()["error"]["message"]

    asyncio.run(main())


def test_another_template(serve: Serve) -> None:
    server = serve(template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    tokens = server.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json()["prompt"] == "[Hi]"
    assert server.get("/tokenizer_info").json()["chat_template"].startswith("{% for m")
    with pytest.raises(UserError, match="no valid Jinja"):
        serve(template="{% for %}")
