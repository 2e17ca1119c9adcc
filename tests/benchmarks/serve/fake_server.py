"""A server of OpenAI's API that says what a script tells it to, byte for byte, over a real socket."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DONE = b"data: [DONE]\n\n"
Script = Callable[[dict[str, Any]], tuple[int, list[bytes]]]  # a request's body to a status and what is written


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def text(piece: str, finish: str | None = None) -> bytes:
    """A chunk of `/v1/completions`."""
    return event({"choices": [{"index": 0, "text": piece, "finish_reason": finish}]})


def delta(**fields: Any) -> bytes:
    """A chunk of `/v1/chat/completions`."""
    return event({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]})


def usage(prompt: int, completion: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})


def answer_of(body: dict[str, Any]) -> tuple[int, list[bytes]]:
    """As many tokens as were asked for, two in each chunk."""
    tokens = body["max_tokens"]
    pieces = [text("ab") for _ in range((tokens + 1) // 2)]
    return 200, [*pieces, usage(len(body["prompt"]), tokens), DONE]


@dataclass
class FakeServer:
    """What was asked of it, and where it is."""

    script: Script
    url: str = ""
    max_model_len: int | None = 64
    tokenizes: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, list[bytes]]:
        if path == "/v1/models":
            card = {"id": "fake", "object": "model", "max_model_len": self.max_model_len}
            return 200, [json.dumps({"object": "list", "data": [card]}).encode()]
        if path == "/tokenize" and self.tokenizes:
            return 200, [json.dumps({"tokens": [100 + len(word) for word in body["prompt"].split()]}).encode()]
        if path.startswith("/v1/"):
            self.asked.append(body)
            return self.script(body)
        return 404, [b'{"error": {"message": "not here"}}']


@contextmanager
def fake_server(script: Script = answer_of, **settings: Any) -> Iterator[FakeServer]:
    fake = FakeServer(script, **settings)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def _answer(self, body: dict[str, Any]) -> None:
            fake.headers.append(dict(self.headers))
            status, pieces = fake.reply(self.path, body)
            self.send_response(status)
            self.send_header("Connection", "close")
            self.end_headers()
            for piece in pieces:
                self.wfile.write(piece)

        def log_message(self, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
