"""`/v1/embeddings`: texts and token ids, numbers and base64, in order; and what is refused."""

import asyncio
import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from atoma_jax import LLM, AsyncLLM, EngineConfig
from atoma_jax.engine.engine import Engine
from atoma_jax.server.app import build_app
from atoma_jax.server.service import Service
from atoma_jax.server.settings import ServerConfig
from tests.engine import test_embeddings as of_engine
from tests.engine.inside import BorrowedRunner
from tests.server.conftest import Served

PATH = "/v1/embeddings"
path, pooled = of_engine.path, of_engine.pooled


@pytest.fixture
def able(pooled: Callable[[str], LLM], make_engine: Callable[..., Engine], path: Path) -> Iterator[Served]:
    """A server whose engine pools."""
    llm = pooled("last")
    engine = make_engine(llm)
    engine._runner = BorrowedRunner(engine._runner)
    service = Service(EngineConfig.from_options({"model": "tiny", "runner": "pooling"}), ServerConfig())
    served = Served(service, build_app(service), AsyncLLM(engine, llm.startup))
    service.start(served.llm)
    yield served
    service.close()


def test_numbers_and_base64_of_texts_and_ids_are_the_engines(able: Served, pooled: Callable[[str], LLM]) -> None:
    ids = [[5, 9, 77], [80, 81, 82, 83], [7]]
    want = of_engine.vectors(pooled("last"), ids)
    body = able.post(PATH, {"input": ids, "model": "tiny"}).json()
    assert [item["index"] for item in body["data"]] == [0, 1, 2]
    np.testing.assert_allclose([item["embedding"] for item in body["data"]], want, atol=2e-6)
    assert body["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    body = able.post(PATH, {"input": ids, "encoding_format": "base64"}).json()
    coded = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in body["data"]]
    np.testing.assert_allclose(coded, want, atol=2e-6)
    text = able.post(PATH, {"input": "The sky", "normalize": False}).json()["data"][0]["embedding"]
    (plain,) = pooled("last").embed("The sky", use_tqdm=False, normalize=False)
    np.testing.assert_allclose(text, plain.outputs.embedding, atol=2e-5)
    assert len(able.post(PATH, {"input": ["a"], "dimensions": 64}).json()["data"]) == 1


def test_the_metrics_count_them(able: Served) -> None:
    able.post(PATH, {"input": [[5, 6], [7, 8]]})
    assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"} 2.0' in (
        able.get("/metrics").text
    )


@pytest.mark.parametrize(
    ("body", "param", "problem"),
    [
        ({"input": []}, "input", "got an empty list"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "float or base64"),
        ({"input": "a", "dimensions": 32}, "dimensions", "must be 64, the model's"),
        ({"input": [[5, 10**9]]}, "input", "input[0][1]"),
        ({"input": [[5] * 60]}, "prompt", "maximum context length is 48"),
        ({"input": ["a"] * 3000}, "input", "at most 2048"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_is_refused_by_name(able: Served, body: dict[str, Any], param: str, problem: str) -> None:
    error = able.refused(PATH, body)
    assert error["param"] == param
    assert problem in error["message"]


def test_each_server_does_one_of_the_two(able: Served, server: Served) -> None:
    assert "runner=pooling" in server.refused(PATH, {"input": "a"})["message"]
    assert "generates no text" in able.refused("/v1/completions", {"prompt": "a"})["message"]


def test_openais_client(able: Served, pooled: Callable[[str], LLM]) -> None:
    """It asks for base64 by itself, and gives numbers."""

    async def main() -> list[float]:
        transport = httpx2.ASGITransport(app=able.app)
        async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=_client(transport)) as client:
            done = await client.embeddings.create(model="tiny", input=["The sky"])
        return done.data[0].embedding

    (want,) = pooled("last").embed("The sky", use_tqdm=False)
    np.testing.assert_allclose(asyncio.run(main()), want.outputs.embedding, atol=2e-6)


def _client(transport: Any) -> Any:
    return httpx2.AsyncClient(transport=transport)
