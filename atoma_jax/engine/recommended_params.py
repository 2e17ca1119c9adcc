"""What a model's makers recommend for sampling, as `SamplingParams`: for requests that bring none."""

import logging
from typing import Any

from atoma_jax.loading.generation_defaults import GenerationDefaults
from atoma_jax.sampling_params import SamplingParams

_log = logging.getLogger(__name__)


def recommended_params(defaults: GenerationDefaults) -> SamplingParams:
    """`defaults`; what they leave open is as in `SamplingParams`."""
    given = {
        "temperature": defaults.temperature,
        "top_p": defaults.top_p,
        "top_k": defaults.top_k,
        "min_p": defaults.min_p,
        "repetition_penalty": defaults.repetition_penalty,
        "max_tokens": defaults.max_new_tokens,
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if chosen:
        _log.info("default sampling parameters of the model: %s", chosen)
    return SamplingParams(**chosen)
