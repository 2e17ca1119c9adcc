"""A whole engine on the Pallas kernels, interpreted, on one device and on meshes: the greedy answers of plain XLA."""

from collections.abc import Callable
from typing import Any

import pytest

from atoma_jax import LLM, SamplingParams
from tests.engine.conftest import SIZES
from tests.tiny_model import write_tiny_llama

pytestmark = pytest.mark.slow  # half a minute of compiling for each engine; each kernel's own tests are quick

PROMPTS = [[5, 6, 7], list(range(3, 40))]  # the second goes through in two chunks
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def answers_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[list[int]]]:
    """What an engine with some options answers; each is asked once. The weights' blocks may be cut in two."""
    path = write_tiny_llama(tmp_path_factory.mktemp("tiny") / "m.gguf", embedding_scale=0.35, width=128)
    sizes: dict[str, Any] = SIZES | {"dtype": "bfloat16", "cpu_precision": "default", "weight_layout": "planar"}
    sizes |= {"max_num_seqs": 2, "decode_rows": (2,), "prefill_tokens": (32,)}
    found: dict[tuple[str, str | None], list[list[int]]] = {}

    def ask(kernels: str, mesh: str | None = None) -> list[list[int]]:
        if (kernels, mesh) not in found:
            llm = LLM(str(path), **sizes, kernels=kernels, mesh=mesh)
            assert llm.startup.kernels == kernels
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            found[kernels, mesh] = [list(output.outputs[0].token_ids) for output in outputs]
            llm.llm_engine.check_integrity()
            llm.shutdown()
        return found[kernels, mesh]

    return ask


@pytest.mark.parametrize("mesh", [None, "tensor=2", "fsdp=2"])
def test_greedy_answers_are_those_of_xla_on_one_device(
    mesh: str | None, answers_of: Callable[..., list[list[int]]]
) -> None:
    """Over `tensor` each device has half of the heads and sums its part of inputs; over `fsdp` weights are gathered."""
    assert answers_of("interpret", mesh) == answers_of("xla")
