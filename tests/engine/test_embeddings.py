"""Embeddings: hidden states of transformers, whatever else is served, and one of the two tasks an engine."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
import pytest

from atoma_jax import LLM, EngineConfig, SamplingParams
from atoma_jax.errors import ConfigError, ParameterError
from atoma_jax.native.library import library
from tests.tiny_model import write_tiny_llama

SIZES: dict[str, Any] = {
    "dtype": "float32",
    "cpu_precision": "exact" if library() else "default",
    "max_model_len": 48,
    "max_num_seqs": 4,
    "prefill_tokens": (48,),
    "block_size": 8,
    "num_pages": 20,
    "runner": "pooling",
}
LENGTHS = (1, 7, 16, 30, 47, 48)  # up to all that the model takes


def prompts_of(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = Random(1)
    return [rng.choices(range(3, 259), k=length) for length in lengths]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    return write_tiny_llama(folder / "m.gguf", kind=gguf.GGMLQuantizationType.F32, embedding_scale=0.35)


@pytest.fixture(scope="module")
def pooled(path: Path) -> Callable[[str], LLM]:
    """An engine that pools, started once for each way."""
    made: dict[str, LLM] = {}

    def start(how: str) -> LLM:
        if how not in made:
            made[how] = LLM(str(path), pooling_type=how, **SIZES)
        return made[how]

    return start


@pytest.fixture(params=["mean", "last"])
def llm(request: pytest.FixtureRequest, pooled: Callable[[str], LLM]) -> Iterator[LLM]:
    llm = pooled(request.param)
    yield llm
    engine = llm.llm_engine
    while engine.has_work:
        engine.step()
    engine.check_integrity()
    assert engine.scheduler_stats().pages_owned == 0
    assert engine.num_recompilations == 0


def vectors(llm: LLM, prompts: list[list[int]], **options: Any) -> np.ndarray:
    return np.asarray([output.outputs.embedding for output in llm.embed(prompts, use_tqdm=False, **options)])


def test_they_are_the_hidden_states_of_transformers(llm: LLM, path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra `oracle`: torch")
    transformers = pytest.importorskip("transformers", reason="needs the extra `oracle`: transformers")
    with warnings.catch_warnings(action="ignore"):  # of how its makers read such files
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float64)
    want: list[np.ndarray] = []
    with torch.no_grad():
        for prompt in prompts_of():
            states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0].numpy()
            want.append(states.mean(axis=0) if llm.llm_engine.model_config.pooling == "mean" else states[-1])
    found = vectors(llm, prompts_of(), normalize=False)
    np.testing.assert_allclose(found, np.asarray(want), rtol=0, atol=2e-5 * np.abs(want).max())
    units = vectors(llm, prompts_of())
    np.testing.assert_allclose(units, found / np.linalg.norm(found, axis=1, keepdims=True), atol=1e-6)


def test_neighbours_and_order_do_not_matter(llm: LLM) -> None:
    prompts = prompts_of()
    alone = np.concatenate([vectors(llm, [prompt]) for prompt in prompts])
    llm.reset_prefix_cache()
    together = vectors(llm, prompts[::-1] * 3)
    for index, one in enumerate(together):
        np.testing.assert_allclose(one, alone[::-1][index % len(prompts)], atol=2e-6)


def test_a_shared_prefix_changes_nothing(llm: LLM) -> None:
    (long,) = prompts_of((40,))
    llm.reset_prefix_cache()
    first = vectors(llm, [long])
    np.testing.assert_allclose(vectors(llm, [long]), first, atol=2e-6)
    (output,) = llm.embed([long], use_tqdm=False)
    assert output.prompt_token_ids == long


def test_what_it_cannot_do_is_refused_by_name(pooled: Callable[[str], LLM], shared_llm: LLM) -> None:
    llm = pooled("last")
    with pytest.raises(ParameterError, match="runner=pooling and generates no text"):
        llm.generate("a", SamplingParams(), use_tqdm=False)
    with pytest.raises(ParameterError, match="Start one with runner=pooling"):
        shared_llm.embed("a", use_tqdm=False)
    with pytest.raises(ParameterError, match="maximum context length is 48 tokens"):
        llm.embed([[5] * 49], use_tqdm=False)
    assert not llm.llm_engine.has_work


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"pooling_type": "mean"}, "pooling_type: is for runner = pooling"),
        ({"runner": "pooling", "pooling_type": "cls"}, "pooling_type: must be one of last, mean"),
        ({"runner": "pooling", "deterministic": True}, "deterministic: is for runner = generate"),
        ({"runner": "pooling", "decode_rows": [4]}, "decode_rows: is for runner = generate"),
        ({"runner": "pooling", "mesh": "tensor=2"}, "mesh: is for runner = generate"),
    ],
)
def test_settings_that_contradict_each_other(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        EngineConfig.from_options({"model": "m", **options})


def test_prompts_are_taken_whole(path: Path) -> None:
    with pytest.raises(ConfigError, match="must be at least max_model_len = 48"):
        LLM(str(path), **{**SIZES, "max_num_batched_tokens": 32, "prefill_tokens": None})
