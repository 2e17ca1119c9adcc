"""The block `metrics` of an answer: only where it is asked for, and what happened to that request."""

import asyncio
import json
from typing import Any

import pytest

from tests.server.conftest import Serve, Served

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
KEYS = {
    *("time_to_first_token_ms", "queue_time_ms", "prefill_time_ms", "generation_time_ms", "e2e_time_ms"),
    *("mean_itl_ms", "tokens_per_second", "cached_tokens", "preemptions", "steps", "padding_ratio"),
}


def chunks_of(server: Served, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    text = server.post(path, {**body, "stream": True}).text
    return [json.loads(event[6:]) for event in text.split("\n\n") if event.startswith("data: {")]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_it_comes_on_demand_alone(server: Served, path: str) -> None:
    body = {**GREEDY, "prompt": [7, 8, 9], "messages": [{"role": "user", "content": "Hi"}]}
    plain, asked = server.post(path, body).json(), server.post(path, {**body, "include_metrics": True}).json()
    assert set(asked) - set(plain) == {"metrics"}
    assert set(asked["metrics"]) == KEYS
    assert asked["choices"] == plain["choices"]
    plain, asked = chunks_of(server, path, body), chunks_of(server, path, {**body, "include_metrics": True})
    assert [chunk["choices"] for chunk in asked] == [*(chunk["choices"] for chunk in plain), []]
    assert ["metrics" in chunk for chunk in asked] == [False] * len(plain) + [True]
    assert "usage" not in asked[-1]
    *_, last = chunks_of(server, path, {**body, "include_metrics": True, "stream_options": {"include_usage": True}})
    assert set(last["metrics"]) == KEYS
    assert last["usage"]["completion_tokens"] == 6


def test_it_says_what_happened_to_the_request(server: Served) -> None:
    """Alone in the engine: a step of 16 positions for a prompt of three tokens, then five of one row each."""
    metrics = server.complete(prompt=[7, 8, 9], include_metrics=True, **GREEDY)["metrics"]
    assert metrics["steps"] == 6
    assert metrics["padding_ratio"] == pytest.approx(1 - 8 / 21, abs=1e-4)
    assert (metrics["cached_tokens"], metrics["preemptions"]) == (0, 0)
    first = metrics["queue_time_ms"] + metrics["prefill_time_ms"]
    assert metrics["time_to_first_token_ms"] == pytest.approx(first, abs=0.002)
    assert metrics["e2e_time_ms"] >= first + metrics["generation_time_ms"] - 0.002
    assert metrics["mean_itl_ms"] == pytest.approx(metrics["generation_time_ms"] / 5, abs=0.002)
    assert metrics["tokens_per_second"] == pytest.approx(6e3 / metrics["generation_time_ms"], rel=0.01)


def test_cached_tokens_and_several_prompts_and_samples(server: Served) -> None:
    prompt = list(range(10, 43))
    server.complete(prompt=prompt, **GREEDY)
    answer = server.complete(prompt=[prompt, [5, 6]], n=2, include_metrics=True, **GREEDY)
    metrics = answer["metrics"]
    assert metrics["cached_tokens"] == answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 32
    assert metrics["mean_itl_ms"] is None
    assert metrics["steps"] >= 2 * 6
    assert 0 < metrics["padding_ratio"] < 1


def test_preemptions(serve: Serve) -> None:
    """Pages for little more than one of two."""
    server = serve(limits={"num_pages": 14})
    body = {**GREEDY, "max_tokens": 80, "include_metrics": True}

    async def main() -> list[int]:
        async with server.client() as client:
            asked = [client.post(COMPLETIONS, json={**body, "prompt": prompt}) for prompt in ([7, 8, 9], [5, 6])]
            answers = await asyncio.gather(*asked)
        return [answer.json()["metrics"]["preemptions"] for answer in answers]

    assert sorted(asyncio.run(main()))[1] >= 1
