"""`bench serve` counts what a server says and times what it sends, whatever form its stream has."""

import asyncio
from typing import Any

import httpx
import numpy as np
import pytest

from atoma_jax.benchmarks.serve.client import Ask, Outcome, Target, send
from atoma_jax.benchmarks.serve.events import EventReader
from atoma_jax.benchmarks.serve.lengths import RandomLengths, sharegpt_like_lengths
from atoma_jax.benchmarks.serve.result import result_of
from atoma_jax.benchmarks.serve.workload import Pace
from tests.benchmarks.serve.fake_server import DONE, delta, event, fake_server, text, usage


def ask(*pieces: bytes, status: int = 200, chat: bool = False) -> Outcome:
    """The outcome of one request to a server that writes these bytes."""

    async def main(url: str) -> Outcome:
        async with httpx.AsyncClient() as client:
            target = Target(url=url, model="fake", chat=chat, body={"ignore_eos": True})
            return await send(client, target, Ask(prompt="Hi", prompt_tokens=1, output_tokens=4))

    with fake_server(lambda body: (status, list(pieces))) as server:
        outcome = asyncio.run(main(server.url))
        (body,) = server.asked
    assert body["stream_options"] == {"include_usage": True}
    assert body["ignore_eos"]
    return outcome


class TestOneRequest:
    def test_tokens_are_those_of_usage_not_the_chunks(self) -> None:
        outcome = ask(text("ab"), text("cd"), usage(7, 5), DONE)
        assert (outcome.text, outcome.prompt_tokens, outcome.output_tokens, outcome.error) == ("abcd", 7, 5, "")
        assert len(outcome.arrivals) == 2
        assert len(outcome.itls) == 1

    def test_usage_may_stand_on_every_chunk_and_the_last_one_counts(self) -> None:
        def chunk(count: int) -> bytes:
            use = {"prompt_tokens": 3, "completion_tokens": count}
            return event({"choices": [{"text": "a"}], "usage": use})

        assert ask(chunk(1), chunk(2), DONE).output_tokens == 2

    def test_an_empty_first_or_last_chunk_is_no_token(self) -> None:
        outcome = ask(text(""), text("a"), text("b"), text("", "stop"), usage(1, 2), DONE)
        assert len(outcome.arrivals) == 2

    def test_chat(self) -> None:
        first = delta(role="assistant", content="")
        outcome = ask(first, delta(reasoning="hm"), delta(content="a"), delta(), usage(9, 3), DONE, chat=True)
        assert (outcome.text, len(outcome.arrivals), outcome.output_tokens) == ("hma", 2, 3)

    def test_comments_and_other_line_ends_are_understood(self) -> None:
        crlf = text("a").replace(b"\n", b"\r\n")
        assert ask(b": ping\n\n", crlf, b"event: x\nid: 1\n\n", usage(1, 1), DONE).output_tokens == 1

    @pytest.mark.parametrize(
        ("pieces", "status", "error"),
        [
            ([b'{"error": {"message": "too many requests"}}'], 429, "HTTP 429: too many requests"),
            ([b'{"error": "Unauthorized"}'], 401, "HTTP 401: Unauthorized"),
            ([b"<html>bad gateway"], 502, "HTTP 502: <html>bad gateway"),
            ([text("a"), event({"error": {"message": "lost"}}), DONE], 200, "lost"),
            ([text("a"), usage(1, 1)], 200, "broke off"),
            ([text("a"), DONE], 200, "no usage"),
            ([usage(1, 0), DONE], 200, "no text"),
            ([b"data: {broken\n\n"], 200, "no OpenAI-compatible server"),
            ([event({"choices": [{"text": 5}]})], 200, "no OpenAI-compatible server"),
        ],
    )
    def test_what_fails_says_why_and_counts_no_token(self, pieces: list[bytes], status: int, error: str) -> None:
        outcome = ask(*pieces, status=status)
        assert error in outcome.error
        assert outcome.output_tokens == 0

    def test_nobody_listens(self) -> None:
        async def main() -> Outcome:
            async with httpx.AsyncClient() as client:
                target = Target(url="http://127.0.0.1:9", model="m")
                return await send(client, target, Ask(prompt="a", prompt_tokens=1, output_tokens=1))

        assert "ConnectError" in asyncio.run(main()).error


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1000])
def test_events_are_the_same_however_the_stream_is_cut(cut: int) -> None:
    stream = b"data: a\n\n: ping\n\ndata:b\r\n\r\ndata: c\ndata: d\n\nretry: 5\n\ndata: \xc3\xa9\n\n"
    reader = EventReader()
    events = [one for start in range(0, len(stream), cut) for one in reader.feed(stream[start : start + cut])]
    assert events == [b"a", b"b", b"c\nd", "é".encode()]


def outcome(start: float, arrivals: list[float], tokens: int, error: str = "") -> Outcome:
    return Outcome(start=start, arrivals=arrivals, output_tokens=tokens, prompt_tokens=10, text="x", error=error)


def result(outcomes: list[Outcome], **settings: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {"duration": 4.0, "limits": {}, "percentiles": (99.0,), "detail": True, **settings}
    return result_of(outcomes, **chosen)


class TestResult:
    """Numbers worked out by hand: two requests that succeed, one that does not."""

    OUTCOMES = (
        outcome(100.0, [100.5, 100.75, 101.5], 5),  # TTFT 500 ms, E2EL 1500 ms, TPOT 250 ms
        outcome(101.0, [101.25], 1),  # one token: no TPOT, no ITL
        outcome(102.0, [102.5], 0, error="HTTP 500: x"),
    )

    def test_counts_and_rates(self) -> None:
        got = result(list(self.OUTCOMES))
        expected = {
            "completed": 2,
            "failed": 1,
            "total_input_tokens": 20,
            "total_output_tokens": 6,
            "request_throughput": 0.5,
            "request_goodput": None,
            "output_throughput": 1.5,
            "total_token_throughput": 6.5,
            "max_concurrent_requests": 2,
            "input_lens": [10, 10, 10],
            "output_lens": [5, 1, 0],
            "errors": ["", "", "HTTP 500: x"],
        }
        assert {name: got[name] for name in expected} == expected
        # Five tokens over three pieces: two pieces in the first second, the third and the other request in the second.
        assert got["max_output_tokens_per_s"] == pytest.approx(10 / 3)

    def test_times(self) -> None:
        got = result(list(self.OUTCOMES))
        assert got["ttfts"] == [0.5, 0.25, 0.0]
        assert got["itls"] == [[0.25, 0.75], [], []]
        assert (got["mean_ttft_ms"], got["median_ttft_ms"], got["std_ttft_ms"]) == (375.0, 375.0, 125.0)
        assert got["p99_ttft_ms"] == pytest.approx(250 + 0.99 * 250)
        assert (got["mean_tpot_ms"], got["std_tpot_ms"]) == (250.0, 0.0)
        assert (got["mean_itl_ms"], got["mean_e2el_ms"]) == (500.0, 875.0)

    @pytest.mark.parametrize(
        ("limits", "good"),
        [
            ({"ttft": 300.0}, 1),
            ({"ttft": 500.0}, 2),
            ({"tpot": 249.0}, 1),
            ({"ttft": 500.0, "e2el": 1e3}, 1),
            ({"e2el": 1.0}, 0),
        ],
    )
    def test_goodput_is_of_those_that_keep_every_limit(self, limits: dict[str, float], good: int) -> None:
        assert result(list(self.OUTCOMES), limits=limits)["request_goodput"] == good / 4

    def test_of_nothing_but_failures(self) -> None:
        got = result([outcome(0.0, [], 0, error="x")], percentiles=(50.0, 99.9))
        assert (got["completed"], got["failed"], got["output_throughput"]) == (0, 1, 0.0)
        assert got["p99.9_e2el_ms"] is None

    def test_without_detail(self) -> None:
        assert not any(isinstance(value, list) for value in result(list(self.OUTCOMES), detail=False).values())


class TestDraws:
    @pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
    def test_gaps_have_the_rate_and_the_burstiness_asked_for(self, burstiness: float) -> None:
        """Mean 1 / rate, and a gamma distribution's coefficient of variation, 1 / √burstiness."""
        moments = Pace(request_rate=4.0, burstiness=burstiness).moments(20_000)
        gaps = np.diff(moments)
        assert moments[0] == 0.0
        assert gaps.mean() == pytest.approx(0.25, rel=0.05)
        assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)

    def test_all_at_once(self) -> None:
        assert Pace().moments(3) == [0.0, 0.0, 0.0]

    def test_the_seed_decides(self) -> None:
        assert Pace(request_rate=1.0, seed=1).moments(5) == Pace(request_rate=1.0, seed=1).moments(5)
        assert Pace(request_rate=1.0, seed=1).moments(5) != Pace(request_rate=1.0, seed=2).moments(5)

    def test_random_lengths_fill_their_range(self) -> None:
        lengths = RandomLengths(input_len=10, output_len=4, range_ratio=0.5)
        prompts, answers = zip(*lengths.draw(2000, 0), strict=True)
        assert (min(prompts), max(prompts), min(answers), max(answers)) == (5, 15, 2, 6)
        assert lengths.longest == 21

    def test_sharegpt_like_lengths_have_its_means_and_fit_into_the_model(self) -> None:
        pairs = np.asarray(sharegpt_like_lengths(20_000, 0, longest=None))
        assert pairs.min() == 4
        assert pairs[:, 0].max() == 1024
        assert pairs.sum(1).max() <= 2048
        # Cutting the tail takes a little off: 161 and 338 before.
        assert pairs.mean(0) == pytest.approx([157, 320], rel=0.03)
        short = np.asarray(sharegpt_like_lengths(1000, 0, longest=64))
        assert short.sum(1).max() == 64
        assert short.min() == 4
