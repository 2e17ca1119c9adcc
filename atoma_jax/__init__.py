"""atoma-jax: an LLM inference engine compiled by XLA."""

from atoma_jax.config import EngineConfig
from atoma_jax.engine.async_engine import AsyncLLM
from atoma_jax.engine.llm import LLM
from atoma_jax.errors import AtomaError, EngineDeadError, Overloaded, UserError
from atoma_jax.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from atoma_jax.sampling_params import RequestOutputKind, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "AtomaError",
    "CompletionOutput",
    "EngineConfig",
    "EngineDeadError",
    "Logprob",
    "Overloaded",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "UserError",
]
