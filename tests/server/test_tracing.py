"""A span for each prompt that was answered: its times, its counts, its place in the client's trace, and no text."""

import asyncio
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from typing import Any

import pytest

from atoma_jax import UserError
from atoma_jax.server.settings import ServerConfig
from atoma_jax.server.tracing import Tracing
from tests.server.conftest import Serve, Served

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
COMPLETIONS = "/v1/completions"


@pytest.fixture
def traced(server: Served) -> tuple[Served, Callable[[], Any]]:
    """A server, and what reads the spans that it has made."""
    pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed (extra otel)")
    export = import_module("opentelemetry.sdk.trace.export")
    memory = import_module("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    server.service.tracing = Tracing(export.SimpleSpanProcessor(memory), "tiny")
    return server, memory.get_finished_spans


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_for_each_prompt(traced: tuple[Served, Callable[[], Any]], stream: bool) -> None:
    server, spans = traced
    body = {"prompt": ["secret words", "The"], "max_tokens": 5, "temperature": 0, "ignore_eos": True, "stream": stream}
    assert server.post(COMPLETIONS, body, headers={"traceparent": TRACEPARENT}).status_code == 200
    made = spans()
    assert [span.name for span in made] == ["llm_request"] * 2
    for span in made:
        assert span.kind.name == "SERVER"
        assert f"{span.context.trace_id:032x}" == TRACEPARENT.split("-")[1]
        assert f"{span.parent.span_id:016x}" == TRACEPARENT.split("-")[2]
        values = dict(span.attributes)
        assert values["gen_ai.usage.completion_tokens"] == 5
        assert values["gen_ai.request.max_tokens"] == 5
        assert values["gen_ai.response.finish_reasons"] == ("length",)
        names = ("time_in_queue", "time_in_model_prefill", "time_in_model_decode", "time_to_first_token", "e2e")
        queue, prefill, decode, first, whole = (values[f"gen_ai.latency.{name}"] for name in names)
        assert queue + prefill == pytest.approx(first)
        assert first + decode <= whole
        assert (span.end_time - span.start_time) / 1e9 == pytest.approx(whole)
        assert "secret" not in str(values)
    assert {span.attributes["gen_ai.usage.prompt_tokens"] for span in made} == {
        server.post("/tokenize", {"prompt": prompt}).json()["count"] for prompt in body["prompt"]
    }


@pytest.mark.parametrize("header", [None, "", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_without_a_trace_of_the_clients_it_is_its_own(traced: tuple[Served, Callable[[], Any]], header: Any) -> None:
    server, spans = traced
    headers = {} if header is None else {"traceparent": header}
    assert server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}, headers=headers).status_code == 200
    assert [span.parent for span in spans()] == [None]


def test_spans_reach_a_collector(serve: Serve) -> None:
    """Over HTTP, sent at the end at the latest."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server = serve(otlp_traces_endpoint=f"http://127.0.0.1:{collector.server_address[1]}/v1/traces")
        server.complete(prompt="a", max_tokens=1)
        asyncio.run(server.idle())
        assert server.service.tracing is not None
        server.service.tracing.close()
        server.service.tracing = None
        collector.shutdown()
        thread.join()
    assert b"llm_request" in b"".join(bodies)


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="otlp_traces_endpoint"):
        ServerConfig(otlp_traces_endpoint="127.0.0.1:4317")


def test_without_the_extra_the_flag_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UserError, match=r"atoma-jax\[otel\]"):
        serve(otlp_traces_endpoint="http://127.0.0.1:4318/v1/traces")
