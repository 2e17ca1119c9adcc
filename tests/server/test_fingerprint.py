"""`system_fingerprint` changes with what decides an answer's bits, and with nothing else."""

from dataclasses import replace
from typing import Any

import pytest

from atoma_jax import EngineConfig
from atoma_jax.server.service import _fingerprint
from tests.server.conftest import Served

CONFIG: dict[str, Any] = {"model": "tiny"}


def of(server: Served, *, startup: dict[str, Any] | None = None, **options: Any) -> str:
    kept = server.llm.startup
    server.llm.startup = replace(kept, **(startup or {}))
    try:
        return _fingerprint(server.llm, EngineConfig.from_options({**CONFIG, **options}))
    finally:
        server.llm.startup = kept


def test_it_is_in_the_answers_and_the_models_files_are_in_it(server: Served) -> None:
    assert len(server.llm.startup.content) == 16
    assert server.complete(prompt="a", max_tokens=1)["system_fingerprint"] == of(server)
    assert server.chat(max_tokens=1)["system_fingerprint"] == of(server)


@pytest.mark.parametrize(
    "change",
    [
        {"startup": {"content": "other"}},
        {"startup": {"kernels": "other"}},
        {"startup": {"mesh": "tensor=2"}},
        {"dtype": "bfloat16"},
        {"kv_cache_dtype": "int8"},
        {"deterministic": True},
    ],
)
def test_what_changes_it(server: Served, change: dict[str, Any]) -> None:
    assert of(server, **change) != of(server)


@pytest.mark.parametrize("change", [{"model": "other name"}, {"num_pages": 100}, {"max_num_queued_reqs": 5}])
def test_what_does_not(server: Served, change: dict[str, Any]) -> None:
    assert of(server, **change) == of(server)
