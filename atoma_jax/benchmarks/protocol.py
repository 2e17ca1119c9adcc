"""What a benchmark needs of an engine: the part of `LLM`'s public face that it drives. Imports no JAX."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Protocol, runtime_checkable

from atoma_jax.outputs import RequestOutput
from atoma_jax.sampling_params import SamplingParams

Prompt = str | Mapping[str, Any]
Prompts = Prompt | Sequence[Prompt]


@runtime_checkable
class Vocabulary(Protocol):
    """The ids that random prompts are drawn from, and those of a text."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def special_ids(self) -> AbstractSet[int]: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with those that the model wants around it or without."""
        ...


@runtime_checkable
class ModelLimits(Protocol):
    """Sizes of the model as it is served."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...


@runtime_checkable
class Stats(Protocol):
    """Times and counters of the engine since they were reset; see `EngineStats`."""

    @property
    def steps(self) -> int: ...
    @property
    def host_seconds(self) -> float: ...
    @property
    def device_seconds(self) -> float: ...
    @property
    def kv_waste(self) -> float: ...
    @property
    def peak_kv_usage(self) -> float: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def prefix_hit_tokens(self) -> int: ...
    @property
    def recompilations(self) -> int: ...


@runtime_checkable
class StepEngine(Protocol):
    """The engine's own loop, one step at a time, so that every token has a time."""

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        ...

    @property
    def model_config(self) -> ModelLimits:
        """Sizes of the model as it is served."""
        ...

    def add_request(self, request_id: str, prompt: Prompt, params: SamplingParams) -> object:
        """Queues a request."""
        ...

    def step(self) -> list[RequestOutput]:
        """Runs a step; returns what is new."""
        ...


@runtime_checkable
class BenchEngine(Protocol):
    """An engine that can be measured."""

    @property
    def llm_engine(self) -> StepEngine:
        """Its loop."""
        ...

    def generate(
        self, prompts: Prompts, sampling_params: SamplingParams | None = None, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """Finished outputs, in the order of the prompts."""
        ...

    def get_tokenizer(self) -> Vocabulary:
        """The model's tokenizer."""
        ...

    def stats(self) -> Stats:
        """Times and counters since `reset_stats`."""
        ...

    def reset_stats(self) -> None:
        """Begins a new reading."""
        ...
