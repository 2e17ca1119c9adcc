"""`/v1/completions`: the shapes that clients read, and the numbers behind them."""

import json
from typing import Any

import pytest

from atoma_jax import LLM, SamplingParams
from tests.server.conftest import Served

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


def chunks_of(text: str) -> list[dict[str, Any]]:
    """The objects of a stream, which must end with [DONE] and consist of nothing else."""
    events = text.split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    assert all(event.startswith("data: ") for event in events[:-1])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def stream(server: Served, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    response = server.post(path, {"stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return chunks_of(response.text)


def test_an_answer_has_every_key_that_clients_read(server: Served, llm: LLM) -> None:
    body = server.complete(prompt="The the", **GREEDY)
    reference = llm.generate(["The the"], SamplingParams(**GREEDY), use_tqdm=False)[0]
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    assert body["id"].startswith("cmpl-")
    assert len(body["id"]) == len("cmpl-") + 16
    assert isinstance(body["created"], int)
    assert body["system_fingerprint"].startswith("fp_")
    (choice,) = body["choices"]
    assert choice == {
        "index": 0,
        "text": reference.outputs[0].text,
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    count = len(reference.prompt_token_ids)
    assert body["usage"] == {
        "prompt_tokens": count,
        "completion_tokens": 6,
        "total_tokens": count + 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_null_means_the_default(server: Served) -> None:
    nulls = dict.fromkeys(("stop", "logprobs", "seed", "n", "logit_bias", "top_p", "stream", "echo", "best_of", "user"))
    plain, given = (server.complete(prompt="ab", **GREEDY, **extra) for extra in ({}, nulls))
    assert plain["choices"] == given["choices"]


def test_choices_of_several_prompts_are_numbered_through(server: Served, llm: LLM) -> None:
    prompts = [[5, 6, 7], [8, 9], [10]]
    body = server.complete(prompt=prompts, n=2, seed=3, temperature=1, max_tokens=4, ignore_eos=True)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4, 5]
    params = SamplingParams(n=2, seed=3, temperature=1, max_tokens=4, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [choice["text"] for choice in body["choices"]] == [s.text for out in outputs for s in out.outputs]
    assert body["usage"]["prompt_tokens"] == 6
    assert body["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize("prompt", ["ab", ["ab", "ab"], [5, 6], [[5, 6], [5, 6]]])
def test_every_form_of_prompt(server: Served, prompt: Any) -> None:
    body = server.complete(prompt=prompt, **GREEDY)
    assert len({choice["text"] for choice in body["choices"]}) == 1


class TestStreams:
    def test_it_brings_one_event_a_token_and_the_same_text(self, server: Served) -> None:
        whole = server.complete(prompt="The", **GREEDY)
        chunks = stream(server, prompt="The", **GREEDY)
        assert len(chunks) == 6
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["length"]
        assert {chunk["object"] for chunk in chunks} == {"text_completion"}
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert all("usage" not in chunk for chunk in chunks)
        assert set(chunks[0]["choices"][0]) == {"index", "text", "logprobs", "finish_reason", "stop_reason"}

    def test_usage_comes_last_without_choices(self, server: Served) -> None:
        chunks = stream(server, prompt=[5, 6], stream_options={"include_usage": True}, **GREEDY)
        assert [len(chunk["choices"]) for chunk in chunks] == [1] * 6 + [0]
        assert chunks[-1]["usage"]["completion_tokens"] == 6
        assert "usage" not in chunks[0]

    def test_usage_on_every_chunk(self, server: Served) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = stream(server, prompt=[5, 6], stream_options=options, **GREEDY)
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 6, 6]

    def test_samples_are_told_apart(self, server: Served) -> None:
        settings: dict[str, Any] = {"n": 2, "seed": 1, "temperature": 1, "max_tokens": 5, "ignore_eos": True}
        whole = server.complete(prompt=["ab", "cd"], **settings)
        texts = dict.fromkeys(range(4), "")
        ends = []
        for chunk in stream(server, prompt=["ab", "cd"], **settings):
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["text"]
            ends += [choice["index"]] if choice["finish_reason"] else []
        assert list(texts.values()) == [choice["text"] for choice in whole["choices"]]
        assert sorted(ends) == [0, 1, 2, 3]

    def test_a_character_cut_over_tokens_comes_whole(self, server: Served) -> None:
        """Forced to repeat the four bytes of an emoji, token by token."""
        ids = server.post("/tokenize", {"prompt": "😀"}).json()["tokens"]
        assert len(ids) == 4
        body: dict[str, Any] = {"prompt": "a", "allowed_token_ids": ids[:1], "max_tokens": 3, "stream": True}
        response = server.post("/v1/completions", body)
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks_of(response.content.decode("utf-8")))
        assert text == "\ufffd" * 3


class TestLogprobs:
    def test_arrays_of_an_answer(self, server: Served) -> None:
        (choice,) = server.complete(prompt="The", logprobs=2, **GREEDY)["choices"]
        arrays = choice["logprobs"]
        assert set(arrays) == {"text_offset", "token_logprobs", "tokens", "top_logprobs"}
        assert {len(values) for values in arrays.values()} == {6}
        assert "".join(arrays["tokens"]) == choice["text"]
        assert arrays["text_offset"][0] == 0
        for token, value, top in zip(arrays["tokens"], arrays["token_logprobs"], arrays["top_logprobs"], strict=True):
            assert top[token] == value == max(top.values())  # greedy
            assert 1 <= len(top) <= 3

    @pytest.mark.parametrize("max_tokens", [0, 1])
    def test_echo_scores_the_prompt(self, server: Served, llm: LLM, max_tokens: int) -> None:
        """What lm-eval asks for: the first entry is null, then the engine's own prompt logprobs."""
        ids = [5, 9, 77, 80, 81]
        ask: dict[str, Any] = {"prompt": ids, "echo": True, "logprobs": 1, "temperature": 0, "max_tokens": max_tokens}
        body = server.complete(**ask)
        arrays = body["choices"][0]["logprobs"]
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, logprobs=1)
        reference = llm.generate([ids], params, use_tqdm=False)[0]
        assert reference.prompt_logprobs is not None
        scores = [entry[token].logprob for token, entry in zip(ids, reference.prompt_logprobs, strict=True) if entry]
        assert arrays["token_logprobs"][:5] == [None, *scores]
        assert arrays["top_logprobs"][0] is None
        assert len(arrays["tokens"]) == 5 + max_tokens
        assert body["choices"][0]["text"].startswith(llm.get_tokenizer().decode(ids))
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == max_tokens

    def test_echo_in_a_stream_comes_with_the_first_chunk(self, server: Served) -> None:
        ask: dict[str, Any] = {"prompt": "The the", "echo": True, "logprobs": 1, **GREEDY}
        (whole,) = server.complete(**ask)["choices"]
        choices = [chunk["choices"][0] for chunk in stream(server, **ask)]
        assert "".join(choice["text"] for choice in choices) == whole["text"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for choice in choices for value in choice["logprobs"][name]] == whole["logprobs"][name]

    def test_tokens_as_ids(self, server: Served) -> None:
        ask: dict[str, Any] = {"return_tokens_as_token_ids": True, "return_token_ids": True, "logprobs": 1, **GREEDY}
        (choice,) = server.complete(prompt=[5, 6], **ask)["choices"]
        assert choice["prompt_token_ids"] == [5, 6]
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]

    def test_prompt_logprobs_by_token_id(self, server: Served) -> None:
        (choice,) = server.complete(prompt=[5, 6], prompt_logprobs=1, **GREEDY)["choices"]
        first, second = choice["prompt_logprobs"]
        assert first is None
        assert set(second["6"]) == {"logprob", "rank", "decoded_token"}


@pytest.mark.parametrize(
    ("setting", "same"),
    [
        ({"stop": "\ufffd"}, False),
        ({"stop_token_ids": list(range(269))}, False),
        ({"logit_bias": {"40": 100}}, False),
        ({"top_k": 1, "temperature": 2, "seed": 1}, True),
        ({"min_p": 1, "temperature": 2, "seed": 1}, True),
        ({"allowed_token_ids": [40]}, False),
        ({"truncate_prompt_tokens": 1}, False),
        ({"repetition_penalty": 100}, False),
        ({"bad_words": ["the"]}, None),
    ],
)
def test_settings_reach_the_sampler(server: Served, llm: LLM, setting: dict[str, Any], same: bool | None) -> None:
    """Each has the effect that it has in the engine."""
    ask: dict[str, Any] = {"prompt": [50, 90, 41], "return_token_ids": True, **GREEDY, **setting}
    (choice,) = server.complete(**ask)["choices"]
    truncate = ask.pop("truncate_prompt_tokens", 0)
    prompt = ask.pop("prompt")[-truncate:]
    del ask["return_token_ids"]
    if "logit_bias" in ask:
        ask["logit_bias"] = {40: 100}
    reference = llm.generate([prompt], SamplingParams(**ask), use_tqdm=False)[0].outputs[0]
    assert (choice["token_ids"], choice["text"]) == (reference.token_ids, reference.text)
    assert choice["stop_reason"] == reference.stop_reason
    if same is not None:
        plain = server.complete(prompt=[50, 90, 41], return_token_ids=True, **GREEDY)["choices"][0]
        assert (choice["token_ids"] == plain["token_ids"]) == same


def test_the_same_seed_gives_the_same_text(server: Served) -> None:
    texts = [
        server.complete(prompt="a", seed=seed, temperature=1.5, max_tokens=8)["choices"][0]["text"]
        for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_unknown_keys_are_named_in_a_header(server: Served) -> None:
    response = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "sede": 5, "x\r\nSet-Cookie": 1})
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "sede, x??Set-Cookie"
    plain = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert "x-ignored-fields" not in plain.headers


def test_a_request_id_comes_back_and_names_the_answer(server: Served) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    response = server.post("/v1/completions", body, headers={"X-Request-Id": "trace/7"})
    assert response.headers["x-request-id"] == "trace/7"
    assert response.json()["id"] == "cmpl-trace/7"
    assert server.complete(**body, request_id="mine")["id"] == "cmpl-mine"
    assert len(server.get("/version").headers["x-request-id"]) == 16


def test_cached_tokens_are_reported(server: Served) -> None:
    ids = list(range(10, 43))
    first, second = (server.complete(prompt=ids, **GREEDY)["usage"]["prompt_tokens_details"] for _ in range(2))
    assert (first, second) == ({"cached_tokens": 0}, {"cached_tokens": 32})
