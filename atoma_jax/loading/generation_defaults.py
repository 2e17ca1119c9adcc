"""How the makers of a model want its tokens drawn: generation_config.json, or `general.sampling.*` of a GGUF file."""

from dataclasses import dataclass

from atoma_jax.loading.gguf.metadata import Metadata
from atoma_jax.loading.json_file import Section

_MAX_COUNT = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Settings in the words and limits of `SamplingParams`; None: the makers do not say."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


def read_gguf_defaults(metadata: Metadata) -> GenerationDefaults:
    """From a GGUF file's keys. A temperature of 0 or below takes the likeliest token, as in llama.cpp.

    Raises:
        WeightFileError: a setting has the wrong type or is outside its limits.
    """
    key = "general.sampling."

    def number(name: str, minimum: float, maximum: float) -> float | None:
        return metadata.get_float(key + name, None, minimum=minimum, maximum=maximum)

    temperature = number("temp", -1.0, 2.0)
    top_k = metadata.get_int(f"{key}top_k", None, minimum=-1, maximum=_MAX_COUNT)
    return GenerationDefaults(
        temperature=None if temperature is None else max(temperature, 0.0),
        top_p=number("top_p", 1e-6, 1.0),
        top_k=None if top_k is None else max(top_k, 0),
        min_p=number("min_p", 0.0, 1.0),
        repetition_penalty=number("penalty_repeat", 0.01, 100.0),
    )


def read_generation_defaults(config: Section) -> GenerationDefaults:
    """From generation_config.json. Without `do_sample`, whose default is to take the likeliest, tokens are drawn.

    Raises:
        WeightFileError: a setting has the wrong type or is outside its limits.
    """

    def number(key: str, minimum: float, maximum: float) -> float | None:
        return config.number(key, minimum=minimum, maximum=maximum) if key in config else None

    def integer(key: str, minimum: int) -> int | None:
        return config.integer(key, minimum=minimum, maximum=_MAX_COUNT) if key in config else None

    return GenerationDefaults(
        temperature=number("temperature", 0.0, 2.0) if config.boolean("do_sample", True) else 0.0,
        top_p=number("top_p", 1e-6, 1.0),
        top_k=integer("top_k", 0),
        min_p=number("min_p", 0.0, 1.0),
        repetition_penalty=number("repetition_penalty", 0.01, 100.0),
        max_new_tokens=integer("max_new_tokens", 1),
    )
