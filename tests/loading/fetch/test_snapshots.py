"""A repository of the hub is fetched as the one model it holds, from a hub on loopback that speaks its protocol."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
import json, sys
from pathlib import Path
from atoma_jax.errors import AtomaError
from atoma_jax.loading.fetch.hub import resolve
for line in sys.stdin:
    model, cache = json.loads(line)
    try:
        found = resolve(model, cache_dir=Path(cache), progress=False)
        names = [found.path.name] if found.kind == "gguf" else sorted(path.name for path in found.path.iterdir())
        answer = " ".join([found.kind, *names])
    except AtomaError as error:
        answer = f"{type(error).__name__} {error}"
    print(json.dumps(answer), flush=True)
"""


class Hub(http.server.ThreadingHTTPServer):
    """One repository, org/name."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.fetched: list[str] = []
        super().__init__(("127.0.0.1", 0), Answer)


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/org/name/resolve/{COMMIT}/")
        content = None
        if path.startswith("/api/models/org/name/revision/"):
            siblings = [{"rfilename": file} for file in self.server.files]
            content = json.dumps(
                {"id": "org/name", "modelId": "org/name", "sha": COMMIT, "siblings": siblings}
            ).encode()
        elif path == f"/api/models/org/name/tree/{COMMIT}":
            tree = [{"type": "file", "path": file, "size": 4, "oid": file} for file in self.server.files]
            content = json.dumps(tree).encode()
        elif name in self.server.files:
            content = b"GGUF"
            if body:
                self.server.fetched.append(name)
        self.send_response(404 if content is None else 200)
        content = content or b""
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{name.replace("/", "-")}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent: pytest's output is for results."""


class Client:
    """A process of its own, since huggingface_hub reads its address when it is imported; one for all tests."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self.process = process

    def resolve(self, model: str, cache: Path) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([model, str(cache)]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Hub, Client]]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", CODE]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            yield server, Client(process)
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(running: tuple[Hub, Client]) -> Hub:
    running[0].files, running[0].fetched = [], []
    return running[0]


@pytest.fixture
def client(running: tuple[Hub, Client]) -> Client:
    return running[1]


def test_hf_layout_is_fetched_without_pickles_and_code(hub: Hub, client: Client, tmp_path: Path) -> None:
    wanted = ["config.json", "model.safetensors", "tokenizer.json"]
    hub.files = [*wanted, "pytorch_model.bin", "modeling.py", "extra.gguf", "weights.pkl"]
    assert client.resolve("org/name", tmp_path) == f"folder {' '.join(wanted)}"
    assert sorted(hub.fetched) == wanted


def test_the_only_gguf_of_a_repository_is_meant_by_its_name(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.files = ["README.md", "m.gguf"]
    assert client.resolve("org/name", tmp_path) == "gguf m.gguf"
    assert hub.fetched == ["m.gguf"]


def test_one_of_several_ggufs_has_to_be_named(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.files = ["a.gguf", "b.gguf"]
    answer = client.resolve("org/name", tmp_path)
    assert answer.startswith("ModelNotFoundError")
    assert "a.gguf, b.gguf" in answer
    assert hub.fetched == []
    assert client.resolve("org/name:b.gguf", tmp_path) == "gguf b.gguf"
    assert hub.fetched == ["b.gguf"]


def test_every_part_of_a_split_gguf_is_fetched(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.files = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "other.gguf"]
    assert client.resolve("org/name/m-00001-of-00002.gguf", tmp_path) == "gguf m-00001-of-00002.gguf"
    assert sorted(hub.fetched) == hub.files[:2]


def test_repository_with_pickles_alone_holds_no_model(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.files = ["config.json", "pytorch_model.bin"]
    answer = client.resolve("org/name", tmp_path)
    assert answer.startswith("ModelNotFoundError")
    assert "pickled weights are never read" in answer
    assert hub.fetched == []


def test_repository_that_is_not_there_is_an_error_that_names_it(hub: Hub, client: Client, tmp_path: Path) -> None:
    answer = client.resolve("org/other", tmp_path)
    assert answer.startswith("DownloadError")
    assert "org/other" in answer


def test_file_that_a_repository_lacks_is_not_found(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.files = ["a.gguf"]
    assert client.resolve("org/name:b.gguf", tmp_path).startswith("ModelNotFoundError")
