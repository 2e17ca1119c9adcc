"""Whatever JSON comes: an answer, or a refusal in the shape of errors, never a fault of ours; and nothing stays."""

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atoma_jax.server.schemas import ChatRequest, CompletionRequest
from tests.server.conftest import Served

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 20),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -(2**63)]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ids = st.lists(st.integers(0, 268), min_size=1, max_size=8)
prompts = st.one_of(
    st.text(max_size=20), ids, st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3), values
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text() | values}
)

# What most requests hold, so that some get as far as the engine.
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "n": st.integers(1, 3),
    "stream": st.booleans(),
    "logprobs": st.integers(0, 5) | st.booleans(),
    "echo": st.booleans(),
    "stop": st.text(min_size=1, max_size=3),
    "prompt_logprobs": st.integers(0, 3),
    "return_token_ids": st.booleans(),
    "allowed_token_ids": ids,
    "logit_bias": st.dictionaries(st.integers(0, 268).map(str), st.floats(-100, 100), max_size=3),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "seed": st.integers(0, 2**63 - 1),
}


def bodies(kind: type[CompletionRequest | ChatRequest], subject: str, of: st.SearchStrategy[Any]) -> Any:
    wild = st.dictionaries(st.sampled_from(sorted(kind.model_fields)), values, max_size=2)
    likely = st.fixed_dictionaries({}, optional=LIKELY)
    return st.builds(
        lambda likely, wild, given, tokens: {"max_tokens": tokens, **likely, subject: given, **wild},
        likely,
        st.one_of(st.just({}), wild),
        of,
        st.integers(0, 3),
    )


# Threads of other libraries may draw numbers while hypothesis makes a body.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning")
@pytest.mark.parametrize(
    ("path", "strategy"),
    [
        ("/v1/completions", bodies(CompletionRequest, "prompt", prompts)),
        ("/v1/chat/completions", bodies(ChatRequest, "messages", st.lists(message, max_size=3) | values)),
    ],
    ids=["completions", "chat"],
)
def test_no_body_makes_the_server_fail(server: Served, path: str, strategy: Any) -> None:
    seen: set[int] = set()

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def ask(body: Any) -> None:
        if isinstance(body.get("max_tokens"), int) and body["max_tokens"] > 20:
            body["max_tokens"] = 3  # the test's time, not the server's limits
        response = server.post(path, body)
        seen.add(response.status_code)
        assert response.status_code in (200, 400, 404), response.text
        if response.status_code == 200:
            assert '"error"' not in response.text
        else:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    ask()
    assert seen >= {200, 400}
    asyncio.run(server.idle())
