"""The server as a process: its socket, signals, what it ends with, and clients that nobody here wrote."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx2
import openai
import pytest

from atoma_jax import LLM, SamplingParams, UserError
from atoma_jax.server.run import listen
from atoma_jax.server.settings import ServerConfig
from tests.server.conftest import Here

LONG: dict[str, Any] = {"prompt": [7, 8, 9], "max_tokens": 80, "temperature": 0, "ignore_eos": True}
COMPLETIONS = "/v1/completions"


def test_probes_are_right_from_loading_to_drain_and_what_runs_finishes(here: Callable[..., Here]) -> None:
    import threading

    gate = threading.Event()
    server = here(slow=0.01, start=lambda: gate.wait(20))

    async def main() -> int:
        running = asyncio.create_task(server.process.run())
        async with httpx2.AsyncClient(base_url=server.url) as client:

            async def probes() -> tuple[int, int]:
                return (await client.get("/health")).status_code, (await client.get("/ready")).status_code

            assert await probes() == (503, 503)
            assert (await client.post(COMPLETIONS, json=LONG)).status_code == 503
            gate.set()
            await server.ready()
            assert await probes() == (200, 200)
            asked = asyncio.create_task(client.post(COMPLETIONS, json=LONG))
            await server.until(lambda: len(server.service.in_flight) == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            await server.until(lambda: server.service.health == "draining")
            assert await probes() == (200, 503)
            refused = await client.post(COMPLETIONS, json=LONG)
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            response = await asked
        assert response.json()["usage"]["completion_tokens"] == 80
        return await running

    assert asyncio.run(main()) == 0


@pytest.mark.parametrize("how", ["a second signal", "the deadline"])
def test_a_drain_ends(here: Callable[..., Here], how: str) -> None:
    server = here(slow=0.1, drain_timeout=0.2 if how == "the deadline" else 60.0)

    async def main() -> int:
        running = asyncio.create_task(server.process.run())
        await server.ready()
        async with httpx2.AsyncClient(base_url=server.url) as client:
            asked = asyncio.create_task(client.post(COMPLETIONS, json=LONG))
            await server.until(lambda: len(server.service.in_flight) == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            await server.until(lambda: server.service.health == "draining")
            if how == "a second signal":
                os.kill(os.getpid(), signal.SIGINT)
            response = await asked
        assert response.status_code == 503
        return await running

    assert asyncio.run(main()) == 0
    assert server.engine.scheduler_stats().pages_owned == 0


def test_a_lost_engine_ends_the_process(here: Callable[..., Here], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atoma_jax.server.run._LAST_WORDS", 0.3)
    server = here(fails_at=5)

    async def main() -> int:
        running = asyncio.create_task(server.process.run())
        await server.ready()
        async with httpx2.AsyncClient(base_url=server.url) as client:
            assert (await client.post(COMPLETIONS, json=LONG)).status_code == 500
            assert (await client.get("/health")).status_code == 503
        return await running

    assert asyncio.run(main()) == 1


def test_an_engine_that_cannot_start_ends_it_with_its_own_error(here: Callable[..., Here]) -> None:
    def fail() -> None:
        raise UserError("model", "m", "is not there")

    with pytest.raises(UserError, match="is not there"):
        asyncio.run(here(start=fail).process.run())


def test_a_signal_while_it_loads_ends_it(here: Callable[..., Here]) -> None:
    import threading

    gate = threading.Event()
    server = here(start=lambda: gate.wait(20))

    async def main() -> int:
        running = asyncio.create_task(server.process.run())
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        return await running

    assert asyncio.run(main()) == 0
    assert server.process.is_loading
    gate.set()
    server.process._loader.join()


def test_an_address_in_use_is_an_error_before_anything_is_loaded() -> None:
    with closing(listen(ServerConfig(port=0))) as taken:
        port = taken.getsockname()[1]
        assert taken.getsockname()[0] == "127.0.0.1"
        with pytest.raises(UserError, match=f"port: cannot be listened on .* got {port}"):
            listen(ServerConfig(port=port))


class TestOnTheWire:
    """What only a socket shows."""

    def raw(self, server: Here, sent: bytes, *, wait: float = 5.0) -> bytes:
        """Sends bytes, and reads until the server closes the connection or `wait` seconds are over."""

        async def main() -> bytes:
            running = asyncio.create_task(server.process.run())
            await server.ready()
            reader, writer = await asyncio.open_connection(*server.url.removeprefix("http://").split(":"))
            writer.write(sent)
            try:
                return await asyncio.wait_for(reader.read(), wait)
            finally:
                writer.close()
                os.kill(os.getpid(), signal.SIGTERM)
                await running

        return asyncio.run(main())

    def test_headers_that_are_too_large(self, here: Callable[..., Here]) -> None:
        ends = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Large: " + b"a" * 60_000 + b"\r\n\r\n"
        assert self.raw(here(), ends).startswith(b"HTTP/1.1 431")
        request = b"GET /version HTTP/1.1\r\nHost: x\r\nX-Large: " + b"a" * 100_000
        assert self.raw(here(), request).startswith(b"HTTP/1.1 4")

    def test_headers_that_never_end(self, here: Callable[..., Here]) -> None:
        assert self.raw(here(header_timeout=0.2), b"GET /version HTTP/1.1\r\nHost: x\r\n").startswith(b"HTTP/1.1 400")

    def test_an_idle_connection_is_closed_after_a_while(self, here: Callable[..., Here]) -> None:
        answer = self.raw(here(keep_alive_timeout=0.2), b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200")

    def test_no_line_end_gets_into_a_header(self, here: Callable[..., Here]) -> None:
        sent = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: a\x0bb\r\n\r\n"
        assert self.raw(here(), sent).startswith(b"HTTP/1.1 400")

    def test_a_stream_that_nobody_reads_is_given_up(self, here: Callable[..., Here]) -> None:
        """An answer larger than the buffers of both sockets, which are small here, and of the server."""
        server = here(send_timeout=0.3)
        server.process._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

        async def main() -> None:
            running = asyncio.create_task(server.process.run())
            await server.ready()
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            host, port = server.url.removeprefix("http://").split(":")
            await loop.sock_connect(client, (host, int(port)))
            ask = {**LONG, "n": 4, "temperature": 1, "logprobs": 20, "stream": True}
            body = json.dumps(ask).encode()
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            await loop.sock_sendall(client, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await server.until(lambda: len(server.service.in_flight) == 1)
            await asyncio.wait_for(server.until(lambda: not server.service.in_flight), 30)
            client.close()
            assert server.engine._recorder.generation_tokens < 4 * 80
            os.kill(os.getpid(), signal.SIGTERM)
            await running

        asyncio.run(main())


class TestOpenAIsClient:
    """The client as its makers ship it, over a socket, against the program."""

    def test_models_and_completions(self, live: str) -> None:
        client = openai.OpenAI(base_url=f"{live}/v1", api_key="secret")
        assert [model.id for model in client.models.list()] == ["tiny"]
        whole = client.completions.create(
            model="tiny", prompt="The", max_tokens=8, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
        )
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 8
        pieces = client.completions.create(
            model="tiny", prompt="The", max_tokens=8, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text

    def test_chat_of_many_tasks(self, live: str) -> None:
        async def main() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="secret") as client:

                async def ask() -> str:
                    stream = await client.chat.completions.create(
                        model="tiny",
                        messages=[{"role": "user", "content": "Hi"}],
                        max_completion_tokens=8,
                        temperature=0,
                        stream=True,
                        stream_options={"include_usage": True},
                    )
                    text = ""
                    async for chunk in stream:
                        if chunk.choices:
                            text += chunk.choices[0].delta.content or ""
                        else:
                            assert chunk.usage is not None
                    return text

                return await asyncio.gather(*(ask() for _ in range(8)))

        assert len(set(asyncio.run(main()))) == 1

    def test_errors_are_its_own(self, live: str) -> None:
        client = openai.OpenAI(base_url=f"{live}/v1", api_key="secret", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="temperature") as refused:
            client.completions.create(model="tiny", prompt="a", temperature=-1)
        assert refused.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="a")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{live}/v1", api_key="wrong").models.list()

    def test_parses_an_answer_into_its_own_type(self, live: str) -> None:
        pytest.importorskip("llguidance", reason="needs the extra `server`: llguidance")
        import pydantic

        class Answer(pydantic.BaseModel):
            model_config = pydantic.ConfigDict(extra="forbid")
            ok: bool

        client = openai.OpenAI(base_url=f"{live}/v1", api_key="secret")
        messages: Any = [{"role": "user", "content": "Hi"}]
        for seed in range(20):  # white space may take all the tokens of one
            try:
                done = client.chat.completions.parse(
                    model="tiny", messages=messages, response_format=Answer, max_tokens=30, seed=seed
                )
            except openai.LengthFinishReasonError:
                continue
            assert isinstance(done.choices[0].message.parsed, Answer)
            return
        raise AssertionError("none of twenty ended")

    def test_a_schema_that_cannot_be_names_its_field(self, live: str) -> None:
        pytest.importorskip("llguidance", reason="needs the extra `server`: llguidance")
        client = openai.OpenAI(base_url=f"{live}/v1", api_key="secret", max_retries=0)
        wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "contains": 1}}}
        with pytest.raises(openai.BadRequestError, match="contains") as refused:
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "Hi"}], response_format=wanted
            )
        assert refused.value.param == "response_format.json_schema.schema"

    def test_a_stream_that_is_closed_gives_its_pages_back(self, live: str) -> None:
        client = openai.OpenAI(base_url=f"{live}/v1", api_key="secret")
        for _ in range(3):
            stream = client.completions.create(
                model="tiny", prompt="a", max_tokens=60, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(stream))
            stream.close()
        headers = {"Authorization": "Bearer secret"}
        with httpx2.Client(base_url=live, headers=headers) as http:
            deadline = time.monotonic() + 10
            while http.get("/load").json()["server_load"]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            page = http.get("/metrics").text
        usage = next(line for line in page.splitlines() if line.startswith("vllm:kv_cache_usage_perc{"))
        assert float(usage.split()[-1]) == 0


def test_scores_of_a_prompt_over_http_are_the_engines_own(live: str, llm: LLM) -> None:
    """What lm-eval's `local-completions` sends and reads, for a batch of token ids."""
    contexts = [[5, 9, 77, 80], [81, 82, 83, 90, 91, 92]]
    ask = {
        "model": "tiny",
        "prompt": contexts,
        "max_tokens": 1,
        "logprobs": 1,
        "echo": True,
        "temperature": 0,
        "seed": 1,
    }
    headers = {"Authorization": "Bearer secret"}
    choices = httpx2.post(f"{live}/v1/completions", json=ask, headers=headers, timeout=60).json()["choices"]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    for choice, ids, output in zip(choices, contexts, llm.generate(contexts, params, use_tqdm=False), strict=True):
        assert output.prompt_logprobs is not None
        values = choice["logprobs"]["token_logprobs"]
        assert len(values) == len(ids) + 1
        expected = [entry[token].logprob for token, entry in zip(ids, output.prompt_logprobs, strict=True) if entry]
        assert values[1:-1] == pytest.approx(expected, abs=1e-3)
