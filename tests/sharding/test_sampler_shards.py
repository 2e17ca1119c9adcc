"""A vocabulary cut over devices gives the tokens of one that is not, bit for bit, and the same logprobs.

So does one that every device of a mesh holds whole.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from atoma_jax.engine.sampler import sample
from atoma_jax.engine.sampler_state import SamplerShape, SamplerState, SlotRules, init_state, write_slot
from atoma_jax.engine.sampling_rows import RowFlag, decode_rows, encode
from atoma_jax.engine.vocab_shards import WHOLE, VocabShards
from atoma_jax.sampling_params import SamplingParams
from sharding.mesh import MeshShape

MESHES = {"cut": MeshShape(tensor=4), "whole": MeshShape(data=2)}
VOCAB = 2400  # above what is searched whole: cuts are found among the likeliest of all parts, or in all
TOP = 5
SETTINGS = (
    {"temperature": 0},
    {"temperature": 0, "logprobs": TOP},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "seed": 4, "top_k": 7, "logprobs": 1},
    {"temperature": 1.0, "seed": 5, "top_p": 0.5},
    {"temperature": 2.0, "seed": 6, "top_p": 0.98},  # keeps more than the likeliest: found in all
    {"temperature": 1.5, "seed": 7, "top_k": 1900, "top_p": 0.9},
    {"temperature": 1.0, "seed": 8, "min_p": 0.1},
    {"temperature": 0, "logit_bias": {2399: 30.0, 5: -4.0}, "logprobs": 2},
    {"temperature": 1.0, "seed": 9, "allowed_token_ids": [1, 601, 1202, 1803, 2399]},
    {"temperature": 0, "presence_penalty": 1.5, "repetition_penalty": 1.3},
    {"temperature": 0},  # with a tie over two parts
    {"temperature": 0},  # with NaN in one part
)
ROWS = len(SETTINGS)


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, np.ndarray, SamplerState]:
    """Logits, packed rows and a state in which every slot is written."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    logits[11, [700, 1300]] = 50.0
    logits[12, 1700] = np.nan
    shape = SamplerShape(slots=ROWS, vocab_size=VOCAB, max_model_len=64)
    state, rows = init_state(shape), []
    for slot, settings in enumerate(SETTINGS):
        params = SamplingParams(**settings)
        rows.append(encode(params, slot=slot, seed=params.seed or 0))
        outputs = logits[slot].argsort()[-3:].tolist()
        state = write_slot(state, jnp.int32(slot), SlotRules(params, shape=shape).slot_row([1, 2, 3], outputs))
    return logits, np.stack(rows), state


def run(case: tuple[np.ndarray, np.ndarray, SamplerState], shards: VocabShards) -> Any:
    logits, rows, state = case

    def step(logits: jax.Array, rows: jax.Array, state: SamplerState) -> Any:
        return sample(logits, decode_rows(rows), state, max_logprobs=TOP, shards=shards)

    if shards.mesh is None:
        return jax.jit(step)(logits, rows, state)
    whole = PartitionSpec()
    cuts = replace(jax.tree.map(lambda _: whole, state), output_counts=PartitionSpec(None, "tensor"))
    mapped = jax.shard_map(
        step,
        mesh=shards.mesh.build(jax.devices()),
        in_specs=(PartitionSpec(None, "tensor"), whole, cuts),
        out_specs=(whole, cuts),
        check_vma=False,
    )
    return jax.jit(mapped)(logits, rows, state)


@pytest.fixture(scope="module")
def of_one_device(case: tuple[np.ndarray, np.ndarray, SamplerState]) -> Any:
    return run(case, WHOLE)


@pytest.mark.parametrize("mesh", MESHES)
def test_tokens_state_and_logprobs_are_those_of_one_device(
    mesh: str, case: tuple[np.ndarray, np.ndarray, SamplerState], of_one_device: Any
) -> None:
    (one, one_state), (many, many_state) = of_one_device, run(case, VocabShards(MESHES[mesh]))
    assert np.asarray(one.ok).tolist() == [row != 12 for row in range(ROWS)]
    assert int(one.tokens[11]) == 700
    for name in ("tokens", "ok", "rank", "top_ids"):
        np.testing.assert_array_equal(getattr(one, name), getattr(many, name), err_msg=name)
    for name in ("logprob", "top_logprobs"):
        np.testing.assert_allclose(getattr(one, name), getattr(many, name), atol=1e-5, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, one_state, many_state)
    flags = case[1][:, 1]
    assert all(
        (flags & int(flag)).any() for flag in (RowFlag.MASK, RowFlag.ADJUST, RowFlag.PENALTIES, RowFlag.LOGPROBS)
    )
