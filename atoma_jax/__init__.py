"""atoma-jax: an LLM inference engine compiled by XLA. Public names only, each imported when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atoma_jax.config import EngineConfig
    from atoma_jax.engine.async_engine import AsyncLLM
    from atoma_jax.engine.convert import Conversion, convert_model
    from atoma_jax.engine.export import export_gguf
    from atoma_jax.engine.llm import LLM
    from atoma_jax.engine.model_plan import ModelPlan, plan_model
    from atoma_jax.engine.scorer import ModelPair, Scorer
    from atoma_jax.engine.startup import follow
    from atoma_jax.engine.stats import EngineStats
    from atoma_jax.errors import AtomaError, EngineDeadError, Overloaded, UserError
    from atoma_jax.outputs import ComparedTokens, CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from atoma_jax.sampling_params import RequestOutputKind, SamplingParams
    from atoma_jax.structured_outputs import StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "AtomaError",
    "ComparedTokens",
    "CompletionOutput",
    "Conversion",
    "EngineConfig",
    "EngineDeadError",
    "EngineStats",
    "Logprob",
    "ModelPair",
    "ModelPlan",
    "Overloaded",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "Scorer",
    "StructuredOutputsParams",
    "UserError",
    "convert_model",
    "export_gguf",
    "follow",
    "plan_model",
]

_HOMES = {
    "atoma_jax.config": ("EngineConfig",),
    "atoma_jax.engine.async_engine": ("AsyncLLM",),
    "atoma_jax.engine.convert": ("Conversion", "convert_model"),
    "atoma_jax.engine.export": ("export_gguf",),
    "atoma_jax.engine.llm": ("LLM",),
    "atoma_jax.engine.model_plan": ("ModelPlan", "plan_model"),
    "atoma_jax.engine.scorer": ("ModelPair", "Scorer"),
    "atoma_jax.engine.startup": ("follow",),
    "atoma_jax.engine.stats": ("EngineStats",),
    "atoma_jax.errors": ("AtomaError", "EngineDeadError", "Overloaded", "UserError"),
    "atoma_jax.outputs": ("ComparedTokens", "CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput"),
    "atoma_jax.sampling_params": ("RequestOutputKind", "SamplingParams"),
    "atoma_jax.structured_outputs": ("StructuredOutputsParams",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports a public name's module (PEP 562): `atoma-jax pull` and the parsers never wait for JAX."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'atoma_jax' has no attribute {name!r}")
    value = import_module(_HOME_OF[name]).__dict__[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
