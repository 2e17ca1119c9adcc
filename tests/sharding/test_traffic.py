"""Engines of every kind of model on every mesh answer 100 random requests at once as one device does: some are
preempted, some find their prefixes. All of it is slow; `test_engine.py` holds the same of one model and one mesh."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from atoma_jax import LLM, SamplingParams
from atoma_jax.engine.model_tokenizer import tokenizer_of
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.model_files import open_model
from atoma_jax.ops import residual, ring
from sharding.mesh import parse_mesh
from tests.engine.traffic import Ask, answers_alike, run_all
from tests.sharding.test_engine import SIZES
from tests.sharding.test_parity import REAL, REFUSED

NUM_ASKS = 100
MESHES = ("tensor=2", "tensor=4", "tensor=8", "fsdp=2", "fsdp=4", "fsdp=8", "fsdp=2,tensor=2", "data=2")
TOYS = ("Q4_1", "gemma", "mixtral", "ternary", "AWQ", "GPTQ")
CASES = [
    pytest.param(name, mesh, marks=(pytest.mark.slow, *((pytest.mark.model,) if name in REAL else ())))
    for name in (*TOYS, *REAL)
    for mesh in (*MESHES, *(("tensor=3", "fsdp=2,tensor=3") if name == "smollm2" else ()))
    if (name, "rows", mesh) not in REFUSED
]


def asks() -> list[Ask]:
    """Greedy ones. Many share the beginning of their prompts, and together they need more pages than there are."""
    rng = Random(17)
    prefixes = [_tokens(rng, 60) for _ in range(5)]
    found: list[Ask] = []
    for _ in range(NUM_ASKS):
        shared = rng.choice(prefixes)[: rng.choice((0, 8, 16, 24, 40))]
        prompt = (*shared, *_tokens(rng, rng.randint(1, 60 - len(shared))))
        params = SamplingParams(
            temperature=0, max_tokens=rng.randint(1, 20), n=rng.choice((1, 1, 2)), ignore_eos=True, detokenize=False
        )
        found.append(Ask(prompt, params, priority=rng.randint(0, 2)))
    return found


def _tokens(rng: Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, 200) for _ in range(count))


def _real_sizes(mesh: str | None) -> dict[str, Any]:
    """Of real models, whose steps take about as long for many rows as for one: they dequantize all weights anew."""
    slices = 1 if mesh is None else parse_mesh(mesh).num_slices
    return SIZES | {
        "max_num_seqs": 16,
        "max_num_batched_tokens": 128,
        "num_pages": 320 // max(4, slices),  # of each slice: too few for its share of the requests
        "decode_rows": (16,),
        "prefill_tokens": (128,),
    }


@pytest.fixture(scope="module")
def start(model_path: Callable[[str], Path]) -> Callable[..., LLM]:
    """Starts an engine. Models without a tokenizer get another one's, which their requests have no use for."""
    with open_model(resolve(str(model_path("F32")), progress=False)) as files:
        tokenizer = tokenizer_of(files)

    def of(name: str, mesh: str | None) -> LLM:
        with pytest.MonkeyPatch.context() as patch:
            sizes = _real_sizes(mesh) if name in REAL else SIZES
            patch.setattr(residual, "CUT_TOKENS", sizes["max_num_batched_tokens"])
            patch.setattr(ring, "RING_NUMBERS", sizes["max_num_batched_tokens"])
            patch.setattr("atoma_jax.engine.startup.has_llguidance", lambda: False)  # two programs less
            if name not in REAL:
                patch.setattr("atoma_jax.engine.startup.tokenizer_of", lambda _: tokenizer)
            return LLM(str(model_path(name)), mesh=mesh, **sizes)

    return of


@pytest.fixture(scope="module")
def on_one_device(start: Callable[..., LLM]) -> Callable[[str], list[Any]]:
    """The answers of a model on one device, computed once."""
    known: dict[str, list[Any]] = {}

    def of(name: str) -> list[Any]:
        if name not in known:
            llm = start(name, None)
            known[name] = run_all(llm.llm_engine, asks())
            llm.shutdown()
        return known[name]

    return of


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_greedy_answers_are_those_of_one_device(
    name: str, mesh: str, start: Callable[..., LLM], on_one_device: Callable[[str], list[Any]]
) -> None:
    want = on_one_device(name)
    llm = start(name, mesh)
    answers_alike(llm, asks(), want)
    llm.shutdown()
