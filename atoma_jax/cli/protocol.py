"""What the commands need of an engine: `LLM`'s public face, named here so that it can be used without importing JAX."""

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from atoma_jax.benchmarks.protocol import BenchEngine
from atoma_jax.evaluation import ComparingPair, TextEncoder
from atoma_jax.outputs import RequestOutput
from atoma_jax.sampling_params import SamplingParams


@runtime_checkable
class StartupReport(Protocol):
    """How the start went: seconds by phase in order, seconds in all, programs found in the compile cache or not; the
    kernels that they run; the mesh, and bytes of each device, planned and allocated."""

    @property
    def phases(self) -> Mapping[str, float]: ...
    @property
    def total(self) -> float: ...
    @property
    def kernels(self) -> str: ...
    @property
    def mesh(self) -> str | None: ...
    @property
    def device_bytes(self) -> Mapping[str, tuple[int, int]]: ...
    @property
    def compile_cache_hits(self) -> int: ...
    @property
    def compile_cache_misses(self) -> int: ...


@runtime_checkable
class ChatEngine(BenchEngine, Protocol):
    """An engine that answers texts and conversations, whole or as a stream."""

    @property
    def startup(self) -> StartupReport:
        """How the start went."""
        ...

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's makers recommend."""
        ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The answer to a conversation."""
        ...

    def stream(self, prompt: str, sampling_params: SamplingParams) -> Generator[RequestOutput]:
        """A prompt's output as it comes. Closing the iterator aborts the request."""
        ...

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], sampling_params: SamplingParams
    ) -> Generator[RequestOutput]:
        """The answer to a conversation as it comes. Closing the iterator aborts the request."""
        ...

    def shutdown(self) -> None:
        """Frees the engine."""
        ...


@runtime_checkable
class LoadedModel(Protocol):
    """One model of a pair."""

    @property
    def model(self) -> str: ...
    @property
    def tokenizer(self) -> TextEncoder: ...


@runtime_checkable
class LoadedPair(ComparingPair, Protocol):
    """A model beside its base: `ModelPair`'s public face."""

    @property
    def base(self) -> LoadedModel: ...
    @property
    def model(self) -> LoadedModel: ...
    @property
    def max_model_len(self) -> int: ...
    def get_tokenizer(self) -> TextEncoder:
        """The base's."""
        ...
