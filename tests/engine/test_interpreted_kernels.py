"""A whole engine on the Pallas kernels, interpreted: the same greedy answers as on plain XLA."""

from pathlib import Path

import pytest

from atoma_jax import LLM, SamplingParams
from tests.engine.conftest import SIZES

PROMPTS = [[5, 6, 7], list(range(3, 40))]  # the second goes through in two chunks
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def answers(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.mark.slow  # a minute of compiling; each kernel's own tests are quick
def test_greedy_answers_are_those_of_xla(tiny_path: Path) -> None:
    sizes = SIZES | {"dtype": "bfloat16", "cpu_precision": "default", "weight_layout": "planar"}
    sizes |= {"max_num_seqs": 2, "decode_rows": (2,), "prefill_tokens": (32,)}
    interpreted, plain = (LLM(str(tiny_path), **sizes, kernels=kernels) for kernels in ("interpret", "xla"))
    assert (interpreted.startup.kernels, plain.startup.kernels) == ("interpret", "xla")
    assert answers(interpreted) == answers(plain)
    interpreted.shutdown()
    plain.shutdown()
