"""What a model's makers recommend holds for requests that say nothing."""

from atoma_jax import SamplingParams
from atoma_jax.engine.recommended_params import recommended_params
from atoma_jax.loading.generation_defaults import GenerationDefaults


def test_every_setting_arrives():
    given = GenerationDefaults(
        temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.1, max_new_tokens=2048
    )
    expected = SamplingParams(temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.1, max_tokens=2048)
    assert recommended_params(given) == expected


def test_what_is_left_open_is_the_usual():
    assert recommended_params(GenerationDefaults()) == SamplingParams()
    assert recommended_params(GenerationDefaults(temperature=0.0)) == SamplingParams(temperature=0.0)
