"""What a GGUF file says of sampling; generation_config.json is tested beside config.json."""

from pathlib import Path
from typing import Any

import pytest

from atoma_jax.errors import WeightFileError
from atoma_jax.loading.generation_defaults import GenerationDefaults, read_gguf_defaults
from atoma_jax.loading.gguf.metadata import Metadata


def defaults(**settings: Any) -> GenerationDefaults:
    keys = {f"general.sampling.{name}": value for name, value in settings.items()}
    return read_gguf_defaults(Metadata(Path("m.gguf"), keys))


def test_settings_are_those_of_the_file() -> None:
    assert defaults(temp=0.6, top_p=0.5, top_k=20, min_p=0.25, penalty_repeat=1.5) == GenerationDefaults(
        temperature=0.6, top_p=0.5, top_k=20, min_p=0.25, repetition_penalty=1.5
    )
    assert defaults() == GenerationDefaults()


def test_llama_cpps_ways_to_switch_something_off() -> None:
    assert defaults(temp=-1.0, top_k=-1) == GenerationDefaults(temperature=0.0, top_k=0)


@pytest.mark.parametrize(("name", "value"), [("temp", 3.0), ("top_p", 0.0), ("top_k", 1.5), ("min_p", "0.1")])
def test_what_no_request_may_ask_for_is_refused(name: str, value: Any) -> None:
    with pytest.raises(WeightFileError, match=f"'general.sampling.{name}'"):
        defaults(**{name: value})
