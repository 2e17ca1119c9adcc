"""Two replicas behind Ray Serve on one machine: the server's own answers; prompts that begin alike meet on one."""

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from atoma_jax.errors import ConfigError
from tests.engine.conftest import SIZES
from tests.server.conftest import tiny_path  # noqa: F401  a fixture
from tests.tiny_model import SMALL_ENGINE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's
]
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def address(
    tiny_path: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[str]:
    ray = pytest.importorskip("ray", reason="ray is not installed (extra ray)")
    serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed (extra ray)")
    app = import_module("atoma_jax.server.ray_app")
    settings = SMALL_ENGINE.replace("[model]", f"[model]\nmodel = {json.dumps(str(tiny_path))}\ndtype = 'float32'")
    settings = settings.replace("[compile]", f"[compile]\ncompile_cache_dir = '{request.config.cache.mkdir('xla')}'")
    settings = settings.replace("max_model_len", f"cpu_precision = '{SIZES['cpu_precision']}'\nmax_model_len")
    file = tmp_path_factory.mktemp("ray") / "serve.toml"
    server = "[server]\nserved_model_name = ['tiny']\napi_key = ['one', 'two']\nmax_body_bytes = 100000\n"
    file.write_text(f"{settings}\n{server}\n[ray]\nnum_replicas = 2\nnum_cpus = 0.5\n")
    root = Path(__file__).parents[2]
    # A limit, as in `program`: what is written without one lacks what others go by.
    environment = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_MAX_SIZE": str(2 << 30)}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": environment}, logging_level="error")
    try:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app.build({"config": str(file)}))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def client(address: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=address, timeout=60, headers={"Authorization": "Bearer one"}) as made:
        yield made


def cached(client: httpx2.Client, prompt: list[int], **headers: str) -> int:
    body = client.post(COMPLETIONS, json={"prompt": prompt, **GREEDY}, headers=headers).json()
    return body["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_prompts_that_begin_alike_meet_the_cache_of_their_replica(client: httpx2.Client) -> None:
    """Whose pages the second request finds, each time: at random it would be every other time."""
    for family in range(6):
        prefix = [10 + family] * 5 + list(range(20, 56))
        assert cached(client, prefix) == 0
        for last in (3, 4, 5):
            assert cached(client, [*prefix, last]) >= 32
    assert cached(client, [10] * 5 + list(range(20, 56)), Authorization="Bearer two") == 0


def test_answers_streams_and_refusals_are_the_servers_own(client: httpx2.Client, address: str) -> None:
    whole = client.post(COMPLETIONS, json={"prompt": "The", **GREEDY}).json()
    outside = openai.OpenAI(base_url=f"{address}/v1", api_key="one", max_retries=0)
    pieces = list(outside.completions.create(model="tiny", prompt="The", stream=True, **GREEDY))
    assert len(pieces) > 1
    assert "".join(piece.choices[0].text for piece in pieces) == whole["choices"][0]["text"]
    with pytest.raises(openai.BadRequestError, match="temperature"):
        outside.completions.create(model="tiny", prompt="a", temperature=-1)
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 401
    assert client.get("/health").status_code == 200
    assert client.get("/ready").headers["x-state"] == "ready"
    assert client.post(COMPLETIONS, content=b"x" * 200_000).status_code == 413
    assert client.get("/metrics").status_code == 404


def aborted() -> float:
    """Samples that ended by an abort, over both replicas, which are told apart by when they were ready."""
    ray, serve = import_module("ray"), import_module("ray.serve")
    app = import_module("atoma_jax.server.ray_app")
    handle = serve.get_deployment_handle("Replica", "default").options(stream=True)
    call = app.Call(prompt="", method="GET", path="/metrics", query=b"", headers=[], body=b"")
    found: dict[str, float] = {}
    deadline = time.monotonic() + 30
    while len(found) < 2 and time.monotonic() < deadline:
        text = b"".join(list(handle.answer.remote(call=call))[1:]).decode()
        ready = re.search(r"^atoma:ready_timestamp_seconds\S* (\S+)", text, re.MULTILINE)
        ended = re.search(r'^vllm:request_success_total\S*"abort"\S* (\S+)', text, re.MULTILINE)
        assert ready is not None
        assert ended is not None
        found[ready[1]] = float(ended[1])
    assert len(found) == 2, ray.nodes()
    return sum(found.values())


def test_a_client_that_leaves_is_aborted(client: httpx2.Client) -> None:
    before = aborted()
    for number in range(8):
        ask = {"prompt": [7 + number, 8], "n": 8, "max_tokens": 60, "ignore_eos": True, "stream": True}
        with client.stream("POST", COMPLETIONS, json=ask) as stream:
            next(stream.iter_lines())
    deadline = time.monotonic() + 20
    while aborted() == before:
        assert time.monotonic() < deadline
    assert client.post(COMPLETIONS, json={"prompt": "a", **GREEDY}).status_code == 200


def test_what_the_router_compares() -> None:
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed (extra ray)")
    text = import_module("atoma_jax.server.ray_app").routing_text
    talk = b'{"messages": [{"role": "user", "content": "Hi"}]}'
    assert text(b'{"prompt": "abc"}', "") == "abc"
    assert text(b'{"prompt": [1, 2]}', "") == "[1, 2]"
    assert "Hi" in text(talk, "")
    assert text(talk, "one")[:16] != text(talk, "two")[:16]
    assert len(text(b'{"prompt": "' + b"a" * 100_000 + b'"}', "k")) == 8192
    assert [text(body, "k") for body in (b"", b"{", b"[]", b"5", b'{"prompt": ""}', b"[" * 100_000)] == [""] * 6


def test_settings_are_checked(tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed (extra ray)")
    build = import_module("atoma_jax.server.ray_app").build
    file = tmp_path / "serve.toml"
    for text, field in (
        ("num_replicas = 0", "num_replicas"),
        ("num_gpus = -1.0", "num_gpus"),
        ("replicas = 2", "replicas"),
    ):
        file.write_text(f"[model]\nmodel = 'm'\n[ray]\n{text}\n")
        with pytest.raises(ConfigError, match=field):
            build({"config": str(file)})
    with pytest.raises(ConfigError, match="config=FILE"):
        build({"model": "m"})
    shipped = Path(__file__).parents[2] / "configs" / "serve" / "ray" / "replicas.toml"
    assert build({"config": str(shipped)}) is not None
