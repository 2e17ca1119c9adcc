"""What the server does not let in, and that it says so by field, value and limit."""

import asyncio
import hmac
import json
import logging
from typing import Any

import pytest

from atoma_jax.server import guard
from tests.server.conftest import Serve, Served, connected

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HUGE = 10**24
JSON = {"Content-Type": "application/json"}


class TestValues:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *((field, value) for field in ("n", "max_tokens") for value in (0, -1, HUGE, True, "7", 1.5)),
            *(("logprobs", value) for value in (-2, HUGE, True, "7", 21)),
            *(("temperature", value) for value in (-1, 3, True, "7", HUGE)),
            *(("top_p", value) for value in (0, 1.1, -1, True, "x")),
            ("top_k", -2),
            ("min_p", 1.5),
            ("repetition_penalty", 0),
            ("presence_penalty", 2.5),
            ("seed", 2**63),
            ("seed", True),
            ("stop", ""),
            ("stop", ["a", ""]),
            ("stop", [1]),
            ("stop", ["a"] * 100 + [str(i) for i in range(300)]),
            ("logit_bias", {"x": 1}),
            ("logit_bias", {"-1": 1}),
            ("logit_bias", {"1": 101}),
            ("logit_bias", {"1": True}),
            ("logit_bias", {str(HUGE): 1}),
            ("logit_bias", {"100000": 1}),
            ("min_tokens", 17),
            ("allowed_token_ids", []),
            ("allowed_token_ids", [10**6]),
            ("stop_token_ids", [-1]),
            ("truncate_prompt_tokens", 0),
            ("priority", HUGE),
            ("priority", "high"),
            ("best_of", 2),
            ("suffix", "x"),
            ("stream", "yes"),
            ("cache_salt", 5),
            ("response_format", "json"),
        ],
    )
    def test_one_outside_its_limits_is_named(self, server: Served, field: str, value: Any) -> None:
        error = server.refused(COMPLETIONS, {"prompt": "a", field: value})
        assert field in error["param"]
        assert field in error["message"]
        assert len(error["message"]) < 500

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
    @pytest.mark.parametrize("field", ["temperature", "top_p", "logit_bias"])
    def test_what_is_no_number_to_json(self, server: Served, number: str, field: str) -> None:
        value = f'{{"1": {number}}}' if field == "logit_bias" else number
        text = f'{{"prompt": "a", "{field}": {value}}}'
        response = server.call("POST", COMPLETIONS, content=text, headers=JSON)
        assert response.status_code == 400
        assert field in response.json()["error"]["param"]

    @pytest.mark.parametrize(
        "prompt",
        [
            *("", [], [[]], [""], None, 5, True, {}, [1.5], [True], [[1, "a"]], [1, "a"], ["a", 1], [[[1]]]),
            *([-1], [10**6], [HUGE], [5] * 96, [5] * 1000, "a\0b", [None]),
        ],
    )
    def test_prompts(self, server: Served, prompt: Any) -> None:
        error = server.refused(COMPLETIONS, {"prompt": prompt})
        assert error["param"] in ("prompt", "prompt_token_ids")
        assert len(error["message"]) < 500

    def test_a_long_prompt_is_neither_cut_nor_taken(self, server: Served) -> None:
        error = server.refused(COMPLETIONS, {"prompt": [5] * 97})
        assert "maximum context length is 96 tokens" in error["message"]
        assert "97 input tokens" in error["message"]
        assert (
            server.complete(prompt=[5] * 95, max_tokens=5, ignore_eos=True)["choices"][0]["finish_reason"] == "length"
        )

    @pytest.mark.parametrize(
        "messages",
        [[], [5], [{}], [{"role": 5}], [{"role": "user", "content": [{"type": "image_url"}]}], "Hi", None, [[]]],
    )
    def test_messages(self, server: Served, messages: Any) -> None:
        assert server.refused(CHAT, {"messages": messages})["param"].startswith("messages")

    def test_too_many_messages_or_choices(self, serve: Serve) -> None:
        server = serve(max_messages=2, max_choices=4)
        assert "--max-messages" in server.refused(CHAT, {"messages": [{"role": "user", "content": "a"}] * 3})["message"]
        error = server.refused(COMPLETIONS, {"prompt": ["a", "b", "c"], "n": 2})
        assert "--max-choices" in error["message"]
        assert error["param"] == "n"


class TestBodies:
    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b"[]", b"5", b'"x"', b"null", b"\xff", b'{"prompt": "\xed\xa0\x80"}', b"{'a': 1}"],
    )
    def test_what_is_no_json_object(self, server: Served, body: bytes) -> None:
        response = server.call("POST", COMPLETIONS, content=body, headers=JSON)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "BadRequestError"

    @pytest.mark.parametrize(
        "text", ['{"prompt": "\\ud800"}', '{"prompt": "a", "user": "\\uDfff"}', '{"\\ud800": 1, "prompt": "a"}']
    )
    def test_a_lone_surrogate(self, server: Served, text: str) -> None:
        response = server.call("POST", COMPLETIONS, content=text, headers=JSON)
        assert response.status_code == 400
        assert "surrogate" in response.json()["error"]["message"]

    def test_a_pair_of_surrogates_is_a_character(self, server: Served) -> None:
        text = '{"prompt": "\\ud83d\\ude00", "max_tokens": 1, "echo": true}'
        response = server.call("POST", COMPLETIONS, content=text, headers=JSON)
        assert response.json()["choices"][0]["text"].startswith("😀")

    @pytest.mark.parametrize("opening", ["[", '{"a":'])
    def test_deep_nesting(self, server: Served, opening: str) -> None:
        for place in ("prompt", "unknown"):
            text = f'{{"prompt": "a", "{place}": {opening * 100_000}'
            response = server.call("POST", COMPLETIONS, content=text, headers=JSON)
            assert response.status_code == 400
        closed = '{"prompt": "a", "max_tokens": 1, "logit_bias": ' + "[" * 900 + "]" * 900 + "}"
        response = server.call("POST", COMPLETIONS, content=closed, headers=JSON)
        assert response.status_code == 400

    def test_one_that_is_too_large(self, serve: Serve) -> None:
        server = serve(max_body_bytes=1000)
        error = server.refused(COMPLETIONS, {"prompt": "a" * 1000}, 413)
        assert "1000 bytes (--max-body-bytes)" in error["message"]

        async def main() -> None:
            chunks = [b'{"prompt": "'] + [b"a" * 100] * 100
            async with connected(server.app, COMPLETIONS, chunks, more=True) as wire:
                await wire.finish()
            assert wire.status == 413

        asyncio.run(main())

    def test_headers_that_are_too_large_though_they_come_at_once(self, serve: Serve) -> None:
        server = serve(max_header_bytes=2000)
        assert server.get("/version", headers={"X-Large": "a" * 1000}).status_code == 200
        for path, headers in (("/version", {"X-Large": "a" * 2000}), ("/version?" + "a" * 2000, {})):
            response = server.get(path, headers=headers)
            assert response.status_code == 431
            assert "2000 bytes (--max-header-bytes)" in response.json()["error"]["message"]

    def test_one_in_many_pieces(self, server: Served) -> None:
        body = json.dumps({"prompt": "ab" * 20, "max_tokens": 1}).encode()

        async def main() -> None:
            pieces = [b" "] * 20_000 + [body[i : i + 1] for i in range(len(body))]
            async with connected(server.app, COMPLETIONS, pieces) as wire:
                await wire.finish()
            assert wire.status == 200

        asyncio.run(main())

    def test_one_that_is_compressed(self, server: Served) -> None:
        response = server.post(COMPLETIONS, {"prompt": "a"}, headers={"Content-Encoding": "gzip"})
        assert response.status_code == 415

    def test_a_slow_one_times_out_while_others_are_served(self, serve: Serve) -> None:
        server = serve(body_timeout=0.2)

        async def main() -> None:
            async with connected(server.app, COMPLETIONS, [b"{"], more=True) as slow, server.client() as client:
                response = await client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1})
                assert response.status_code == 200
                assert not slow.sent
                await slow.finish()
            assert slow.status == 408

        asyncio.run(main())


class TestKeys:
    @pytest.fixture
    def closed(self, serve: Serve) -> Served:
        return serve(api_key=("first-key", "second-key"))

    def test_the_api_and_what_changes_the_server_wants_one(self, closed: Served) -> None:
        routes = [(method, path) for path, operations in closed.app.openapi()["paths"].items() for method in operations]
        assert len(routes) == 16
        kept = ("/v1/", "/start_profile", "/stop_profile", "/reset_prefix_cache")
        for method, path in [*routes, ("get", "/"), ("get", "/ui/main.js"), ("get", "/docs"), ("get", "/v1/nowhere")]:
            response = closed.call(method.upper(), path)
            if path.startswith(kept):
                assert response.status_code == 401, path
                assert response.json()["error"]["type"] == "AuthenticationError"
            else:
                assert response.status_code in (200, 400), path  # 400: a body is missing, no key

    def test_all_but_the_probes_may_want_one(self, serve: Serve) -> None:
        server = serve(api_key=("first-key",), api_key_scope="all")
        routes = [(method, path) for path, operations in server.app.openapi()["paths"].items() for method in operations]
        for method, path in [*routes, ("get", "/"), ("get", "/ui/main.js"), ("get", "/docs"), ("get", "/openapi.json")]:
            status = server.call(method.upper(), path).status_code
            assert status == (200 if path in ("/health", "/ping", "/ready") else 401), path
        assert server.get("/metrics", headers={"Authorization": "Bearer first-key"}).status_code == 200

    @pytest.mark.parametrize(
        "path", ["/v1", "/v1/", "//v1/models", "/./v1/models", "/x/../v1/models", "/%761/models", "/V1/models"]
    )
    def test_no_other_spelling_opens_it(self, closed: Served, path: str) -> None:
        assert closed.get(path).status_code in (401, 404)

    @pytest.mark.parametrize(
        "header",
        ["", "Bearer", "Bearer ", "Bearer first", "Bearer first-key2", "first-key", "Basic first-key", "Bearer é"],
    )
    def test_wrong_ones(self, closed: Served, header: str) -> None:
        response = closed.get("/v1/models", headers={"Authorization": header.encode("latin-1")})
        assert response.status_code == 401
        assert "first-key" not in response.text

    @pytest.mark.parametrize("key", ["first-key", "second-key"])
    def test_any_of_them_opens(self, closed: Served, key: str) -> None:
        assert closed.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200

    def test_each_is_compared_whole_whatever_is_sent(self, closed: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        compared: list[tuple[int, int]] = []
        compare = hmac.compare_digest

        def counted(one: bytes, other: bytes) -> bool:
            compared.append((len(one), len(other)))
            return compare(one, other)

        monkeypatch.setattr(guard.hmac, "compare_digest", counted)
        for key in ("first-key", "second-key", "x", "x" * 5000):
            closed.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert compared == [(32, 32)] * 8

    def test_callers_with_different_keys_share_no_prefix(self, closed: Served) -> None:
        def cached(key: str, salt: str | None = None) -> int:
            body = {"prompt": list(range(10, 43)), "max_tokens": 1, "cache_salt": salt}
            response = closed.post(COMPLETIONS, body, headers={"Authorization": f"Bearer {key}"})
            return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert [cached("first-key"), cached("first-key")] == [0, 32]
        assert [cached("second-key"), cached("second-key")] == [0, 32]
        assert [cached("first-key", "a"), cached("first-key", "b"), cached("first-key", "a")] == [0, 0, 32]


class TestAnswersAndLogs:
    @pytest.mark.parametrize("value", ["a b", "é", "x" * 200, ""])
    def test_a_request_id_must_be_visible_ascii(self, server: Served, value: str) -> None:
        response = server.get("/version", headers={"X-Request-Id": value.encode("latin-1")})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "X-Request-Id"

    def test_a_fault_of_ours_shows_nothing_of_itself(
        self, server: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(*_: Any) -> None:
            raise ZeroDivisionError("/secret/path at 0x7f00")

        monkeypatch.setattr(type(server.service.prompts), "of_completion", fail)
        error = server.refused(COMPLETIONS, {"prompt": "a"}, 500)
        assert error["type"] == "InternalServerError"
        assert "secret" not in error["message"]
        assert any("ZeroDivisionError" in str(record.exc_info) for record in caplog.records)

    def test_a_line_for_each_request_without_its_text(self, server: Served, caplog: pytest.LogCaptureFixture) -> None:
        from atoma_jax.server.logs import JsonFormatter

        with caplog.at_level(logging.INFO, "atoma_jax"):
            server.complete(prompt="confidential\r\nwords", max_tokens=2, ignore_eos=True)
            server.refused(COMPLETIONS, {"prompt": "a", "temperature": -1})
            server.get("/a%0d%0ab")
        lines = [JsonFormatter().format(record) for record in caplog.records if record.name.startswith("atoma_jax")]
        assert all("\n" not in line and "confidential" not in line for line in lines)
        done, refused, lost = [json.loads(line) for line in lines]
        assert (done["path"], done["status"], done["completion_tokens"]) == (COMPLETIONS, 200, 2)
        assert len(done["request_id"]) == 16
        assert (refused["status"], lost["status"]) == (400, 404)
