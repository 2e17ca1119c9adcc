"""Rotary frequencies are those that `transformers` computes of the same settings, in both spellings."""

from typing import Any

import numpy as np
import pytest

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.hf.rope import RopeDefaults, read_rope, trained_positions
from atoma_jax.loading.json_file import Section

HEAD = 32
BASE = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": HEAD, "max_position_embeddings": 4096}
SHORT = [1.0 + i / 16 for i in range(HEAD // 2)]
LONG = [1.0 + i / 4 for i in range(HEAD // 2)]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, magnitude of its own": {**YARN, "attention_factor": 0.7},
    "yarn, two slopes": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, other turns": {**YARN, "beta_fast": 16, "beta_slow": 2},
    "yarn, borders inside of pairs": {**YARN, "truncate": False},
    "yarn, factor below 1": {**YARN, "factor": 0.5},
    "longrope": LONGROPE,
    "longrope, factor of its own": {**LONGROPE, "factor": 2.0},
    "longrope, magnitude of its own": {**LONGROPE, "attention_factor": 1.3},
}


def spec(config: dict[str, Any], context: int = 4096, **defaults: Any) -> Any:
    return read_rope(
        Section("config.json: config", {**BASE, **config}), RopeDefaults(**defaults), head_dim=HEAD, context=context
    )


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("context", [1024, 4096])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str, context: int, theta: float) -> None:
    pytest.importorskip("torch", reason="needs the extra `oracle`: torch")
    transformers = pytest.importorskip("transformers", reason="needs the extra `oracle`: transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = SCALINGS[name]
    config = transformers.LlamaConfig(**BASE, rope_parameters={**scaling, "rope_theta": theta})
    if name == "default":
        want, magnitude = 1 / theta ** (np.arange(0, HEAD, 2) / HEAD), 1.0
    else:
        tensor, magnitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu", seq_len=context)
        want = tensor.numpy()
    old = {"rope_theta": theta, "rope_scaling": {"type": scaling["rope_type"], **scaling}}
    del old["rope_scaling"]["rope_type"]
    for settings in ({"rope_parameters": {**scaling, "rope_theta": theta}}, old):
        found = spec(settings, context)
        np.testing.assert_allclose(found.frequencies, want, rtol=2e-6)
        assert found.magnitude == pytest.approx(magnitude)
        assert found.local_frequencies is None


def test_the_short_and_the_long_factors_differ() -> None:
    short, long = (spec({"rope_parameters": LONGROPE}, context) for context in (1024, 1025))
    np.testing.assert_allclose(np.divide(short.frequencies, long.frequencies), np.divide(LONG, SHORT))
    assert short.magnitude == long.magnitude


def test_phi3_counts_the_first_context_beside_its_scaling() -> None:
    scaling = {"type": "su", "short_factor": SHORT, "long_factor": LONG}
    old = {"rope_scaling": scaling, "original_max_position_embeddings": 1024}
    assert spec(old, partial=True, old_kinds=True) == spec({"rope_parameters": LONGROPE})
    with pytest.raises(UnsupportedModelError, match=r"rope_scaling\.type: is not implemented; .*, got 'su'"):
        spec(old)


def test_a_part_of_each_head_rotates() -> None:
    share = {"partial_rotary_factor": 0.75}
    for config in (share, {"rope_parameters": {"rope_type": "default", **share}}):
        np.testing.assert_allclose(spec(config, partial=True).frequencies, 1e4 ** (-np.arange(0, 24, 2) / 24))
        with pytest.raises(UnsupportedModelError, match=r"partial_rotary_factor: must be 1: .* whole heads, got 0\.75"):
            spec(config)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 2e6, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
    ],
)
def test_layers_with_a_window_rotate_on_their_own(config: dict[str, Any]) -> None:
    found = spec(config, theta=1e6, local_theta=1e4)
    pairs = np.arange(0, HEAD, 2) / HEAD
    np.testing.assert_allclose(found.frequencies, 2e6**-pairs / 8)
    np.testing.assert_allclose(found.local_frequencies, 2e4**-pairs)


def test_what_a_config_leaves_out_is_the_architectures() -> None:
    found = spec({}, theta=1e6, local_theta=1e4)
    assert (found.frequencies[1], found.local_frequencies[1]) == (1e6 ** (-2 / HEAD), 1e4 ** (-2 / HEAD))
    assert spec({}).frequencies[1] == 1e4 ** (-2 / HEAD)


@pytest.mark.parametrize(("positions", "expected"), [(1024, 4096), (4096, 4096), (8192, 8192)])
def test_yarn_stretches_the_context_whether_or_not_the_config_counts_it(positions: int, expected: int) -> None:
    config = {"max_position_embeddings": positions, "rope_scaling": YARN}
    assert trained_positions(Section("config", config)) == expected


@pytest.mark.parametrize("kind", ["dynamic", "mrope", "proportional", "axial"])
def test_a_scaling_that_is_not_implemented_is_refused_by_name(kind: str) -> None:
    problem = "is not implemented; those that are: default, linear, llama3, yarn, longrope"
    with pytest.raises(UnsupportedModelError, match=rf"config\.rope_scaling\.type: {problem}, got '{kind}'"):
        spec({"rope_scaling": {"type": kind, "factor": 2.0}})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": 3}, "rope_type: must be a string, got 3"),
        ({"rope_type": "linear"}, "factor: is missing"),
        ({"rope_type": "linear", "factor": 0}, r"factor: must be a number in \[0\.001, 1e\+06\], got 0"),
        ({"rope_type": "linear", "factor": True}, "factor: must be a number in .*, got True"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor: must be a number in .*, got nan"),
        ({"rope_type": "linear", "factor": 10**400}, "factor: must be a number in"),
        ({"rope_theta": 1}, r"rope_theta: must be a number in \[2, 1e\+12\], got 1"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor: must be above low_freq_factor = 1, got 1.0"),
        ({**LLAMA3, "original_max_position_embeddings": 0}, "original_max_position_embeddings: must be a whole number"),
        ({**LONGROPE, "long_factor": LONG[1:]}, "long_factor: must be a list of 16 numbers in"),
        ({**LONGROPE, "short_factor": [*SHORT[1:], 0]}, "short_factor: must be a list of 16 numbers in"),
        ({**YARN, "truncate": 1}, "truncate: must be true or false, got 1"),
    ],
)
def test_impossible_settings_are_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightFileError, match=rf"config\.json: config\.rope_parameters\.{message}"):
        spec({"rope_parameters": scaling})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"full_attention": {"rope_type": "default"}}, "full_attention: must be left out: this architecture"),
        ({**LONGROPE, "long_mscale": 1.2}, "long_mscale: must be left out"),
    ],
)
def test_features_that_are_not_implemented_are_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        spec({"rope_parameters": scaling})


def test_magnitudes_of_layers_with_a_window_are_refused() -> None:
    nested = {"full_attention": {"rope_type": "default"}, "sliding_attention": YARN}
    with pytest.raises(UnsupportedModelError, match=r"sliding_attention\.rope_type: must be default or linear"):
        spec({"rope_parameters": nested}, local_theta=1e4)
