"""Which layer implements which family."""

from atoma_jax.model_spec import Family
from atoma_jax.models.gemma import GemmaLayer
from atoma_jax.models.llama import LlamaLayer
from atoma_jax.models.mixture import MixtureLayer

LAYERS: dict[Family, type[LlamaLayer]] = {"llama": LlamaLayer, "gemma": GemmaLayer, "mixture": MixtureLayer}
