"""An `LLM` without a model: answers every prompt with counted words, one a token. As a script: the program around it.

"slow" in a prompt makes it take its time over each token; "fail" kills the engine; "unreachable" as a model cannot be
fetched. A prompt of 200 tokens or more is too long. A token of a prompt is a character.
"""

import dataclasses
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

import atoma_jax
from atoma_jax import EngineConfig, RequestOutputKind, SamplingParams
from atoma_jax.cli import main
from atoma_jax.errors import DownloadError, EngineDeadError
from atoma_jax.outputs import ComparedTokens, CompletionOutput, Logprob, RequestMetrics, RequestOutput
from atoma_jax.sampling_params import validate_prompt

MAX_MODEL_LEN = 200
SLOW_SECONDS = 0.05  # a token


LIMITS = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 2}


class FakeTokenizer:
    """A token is a character; two special ones. BOS (1) goes before a text where `adds_bos` says so."""

    vocab_size = 5000
    special_ids = frozenset({0, 1})
    adds_bos = False

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = [ord(char) for char in text]
        return [1, *ids] if add_special_tokens and self.adds_bos else ids


def words(count: int) -> list[str]:
    """What the fake says: "0 1 2 …", and so on."""
    return [f"{number} " for number in range(count)]


@dataclasses.dataclass
class FakeEngine:
    """The loop: every step gives each request one more token."""

    model_config: Any = dataclasses.field(
        default_factory=lambda: SimpleNamespace(max_model_len=MAX_MODEL_LEN, max_num_seqs=2)
    )
    queue: dict[str, deque[RequestOutput]] = dataclasses.field(default_factory=dict)
    asked: list[SamplingParams] = dataclasses.field(default_factory=list)

    @property
    def has_work(self) -> bool:
        return bool(self.queue)

    def add_request(self, request_id: str, prompt: Any, params: SamplingParams) -> None:
        self.asked.append(params)
        self.queue[request_id] = deque(answer(request_id, prompt, params))

    def step(self) -> list[RequestOutput]:
        outputs = [pending.popleft() for pending in self.queue.values()]
        self.queue = {name: pending for name, pending in self.queue.items() if pending}
        return outputs


class FakeLLM:
    """`LLM`'s public face."""

    built: ClassVar[list["FakeLLM"]] = []

    def __init__(self, config: EngineConfig):
        self.config = config
        self.asked: list[tuple[Any, SamplingParams]] = []
        self.open_streams = 0
        self.is_shut_down = False
        self.llm_engine = FakeEngine()
        self.startup = SimpleNamespace(
            mesh=None,
            device_bytes={},
            phases={"weights": 0.5, "warm_up": 0.25},
            total=0.75,
            kernels="xla",
            compile_cache_hits=3,
            compile_cache_misses=1,
        )
        FakeLLM.built.append(self)

    @classmethod
    def from_config(cls, config: EngineConfig, *, on_phase: Callable[[str, float], None] | None = None) -> "FakeLLM":
        if config.model.model == "unreachable":
            raise DownloadError("unreachable: no network.")
        llm = cls(config)
        assert on_phase is not None
        for name, seconds in llm.startup.phases.items():
            on_phase(name, seconds)
        return llm

    def get_tokenizer(self) -> FakeTokenizer:
        return FakeTokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.25, top_k=40, repetition_penalty=1.5, max_tokens=3)

    def stats(self) -> Any:
        return SimpleNamespace(
            steps=10,
            host_seconds=0.005,
            device_seconds=0.1,
            kv_waste=0.02,
            peak_kv_usage=0.5,
            preemptions=0,
            prefix_hit_tokens=0,
            recompilations=0,
        )

    def reset_stats(self) -> None:
        pass

    def generate(
        self, prompts: Sequence[Any], sampling_params: SamplingParams | None = None, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        assert sampling_params is not None
        params = dataclasses.replace(sampling_params, output_kind=RequestOutputKind.FINAL_ONLY)
        self.asked += [(prompt, params) for prompt in prompts]
        return [next(iter(answer("r", prompt, params))) for prompt in prompts]

    def chat(self, messages: Any, sampling_params: SamplingParams | None = None, use_tqdm: bool = True) -> Any:
        return self.generate([render(messages)], sampling_params, use_tqdm)

    def stream(self, prompt: str, sampling_params: SamplingParams) -> Generator[RequestOutput]:
        self.asked.append((prompt, sampling_params))
        self.open_streams += 1
        try:
            for output in answer("r", prompt, sampling_params):
                if "slow" in prompt:
                    time.sleep(SLOW_SECONDS)
                yield output
        finally:
            self.open_streams -= 1

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], sampling_params: SamplingParams
    ) -> Generator[RequestOutput]:
        return self.stream(render(messages), sampling_params)

    def shutdown(self) -> None:
        self.is_shut_down = True


class OtherTokenizer(FakeTokenizer):
    """Reads every text otherwise."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [token + 1 for token in super().encode(text, add_special_tokens=add_special_tokens)]


class FakePair:
    """`ModelPair`'s public face. The model "other" has a tokenizer of its own, "nan" scores a token with NaN."""

    built: ClassVar[list["FakePair"]] = []
    max_model_len = MAX_MODEL_LEN

    def __init__(self, base: EngineConfig, model: EngineConfig):
        self.configs = base, model
        self.base, self.model = (
            SimpleNamespace(
                model=config.model.model,
                tokenizer=OtherTokenizer() if config.model.model == "other" else FakeTokenizer(),
            )
            for config in self.configs
        )
        self.asked: list[tuple[list[int], int]] = []
        FakePair.built.append(self)

    @classmethod
    def load(
        cls, base: EngineConfig, model: EngineConfig, *, on_loaded: Callable[[str], object], progress: bool = True
    ) -> "FakePair":
        pair = cls(base, model)
        on_loaded("base")
        on_loaded("model")
        return pair

    def get_tokenizer(self) -> FakeTokenizer:
        return self.base.tokenizer

    def windows_at_once(self, context: int) -> int:
        return 2

    def compare(
        self,
        windows: Sequence[tuple[Sequence[int], int]],
        *,
        context: int,
        rows: int,
        on_tokens: Callable[[int], object],
    ) -> list[ComparedTokens]:
        return [self._compare(ids, first, on_tokens) for ids, first in windows]

    def _compare(self, token_ids: Sequence[int], first: int, on_tokens: Callable[[int], object]) -> ComparedTokens:
        self.asked.append((list(token_ids), first))
        ids = np.array(token_ids[first:])
        base_nll = (ids % 10 / np.float32(4)).astype(np.float32)
        nll = base_nll + np.float32(0.5)
        if self.model.model == "nan":
            nll[0] = math.nan
        on_tokens(len(ids))
        return ComparedTokens(base_nll=base_nll, nll=nll, kld=nll / 8, same_top=ids % 2 == 0)


def render(messages: Sequence[Mapping[str, Any]]) -> str:
    """The fake's chat template."""
    return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def answer(request_id: str, prompt: Any, params: SamplingParams) -> Generator[RequestOutput]:
    """The outputs of a request, as `params.output_kind` asks for."""
    text = prompt if isinstance(prompt, str) else None
    ids = [ord(char) for char in prompt] if isinstance(prompt, str) else prompt["prompt_token_ids"]
    if text is not None and "fail" in text:
        raise EngineDeadError("A step failed.")
    if text is not None and "interrupt" in text:
        raise KeyboardInterrupt
    if text is not None and "broken" in text:
        raise RuntimeError("no such thing")
    validate_prompt(ids, vocab_size=FakeTokenizer.vocab_size, max_model_len=MAX_MODEL_LEN)
    said = words(params.max_tokens or MAX_MODEL_LEN - len(ids))
    now = time.perf_counter()
    metrics = RequestMetrics(
        arrival_time=now,
        first_scheduled_time=now,
        first_token_time=now + 0.5,
        last_token_time=now + 0.5 + 0.1 * (len(said) - 1),
        finished_time=now + 0.5 + 0.1 * len(said),
        num_generation_tokens=len(said),
    )

    def output(pieces: list[str], *, finished: bool) -> RequestOutput:
        logprobs = [{7: Logprob(-0.5, 1, piece), 8: Logprob(-float("inf"), 2, "x")} for piece in pieces]
        samples = [
            CompletionOutput(
                index=index,
                text="".join(pieces),
                token_ids=[7] * len(pieces),
                cumulative_logprob=None if params.logprobs is None else -0.5 * len(pieces),
                logprobs=None if params.logprobs is None else logprobs,
                finish_reason="length" if finished else None,
            )
            for index in range(params.n)
        ]
        scores = None if params.prompt_logprobs is None else [None, *({i: Logprob(nll(i))} for i in ids[1:])]
        return RequestOutput(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=list(ids),
            prompt_logprobs=scores,
            outputs=samples,
            finished=finished,
            metrics=metrics,
        )

    if params.output_kind is RequestOutputKind.FINAL_ONLY:
        yield output(said, finished=True)
        return
    for number, piece in enumerate(said):
        yield output([piece], finished=number == len(said) - 1)


def nll(token_id: int) -> float:
    """The fake's log-probability of a token of a prompt."""
    return -(token_id % 10) / 4


if __name__ == "__main__":
    atoma_jax.LLM = FakeLLM
    sys.argv[0] = "atoma-jax"
    main()
