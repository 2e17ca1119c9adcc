"""Random requests, and a driver that runs them through an engine in a random order of events."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from atoma_jax import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from atoma_jax.engine.engine import Engine

TEXT_IDS = range(3, 259)  # every token of one byte
VOCAB = 269


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0


def random_asks(rng: Random, count: int, *, num_prefixes: int = 5, longest: int = 60) -> list[Ask]:
    """Requests of all kinds: lengths, samples, rules, stops, logprobs. Many share the beginning of their prompts."""
    prefixes = [_tokens(rng, longest) for _ in range(num_prefixes)]
    asks: list[Ask] = []
    for index in range(count):
        shared = rng.choice(prefixes)[: rng.choice((0, 0, 8, 16, 24, 40))]
        prompt = (*shared, *_tokens(rng, rng.randint(1, longest - len(shared))))
        asks.append(Ask(prompt, random_params(rng, seed=index), priority=rng.randint(0, 2)))
    return asks


def random_params(rng: Random, seed: int) -> SamplingParams:
    """Every setting of a request is used by some."""
    settings: dict[str, Any] = {
        "max_tokens": rng.randint(1, 20),
        "temperature": rng.choice((0.0, 0.0, 0.7, 1.3)),
        "seed": seed,
        "ignore_eos": rng.random() < 0.5,
    }
    extras: list[dict[str, Any]] = [
        {"n": rng.randint(2, 3)},
        {"logprobs": rng.randint(0, 3)},
        {"prompt_logprobs": rng.randint(0, 2), "logprobs": 1},
        {"stop": [chr(rng.randint(97, 122)) for _ in range(4)]},
        {"stop_token_ids": rng.sample(TEXT_IDS, 30)},
        {"min_tokens": settings["max_tokens"] // 2, "stop": ["e", "t"]},
        {"presence_penalty": rng.uniform(-1, 1), "frequency_penalty": rng.uniform(-1, 1)},
        {"repetition_penalty": rng.uniform(0.8, 1.4)},
        {"logit_bias": {rng.choice(TEXT_IDS): rng.uniform(-5, 5) for _ in range(3)}},
        {"allowed_token_ids": rng.sample(TEXT_IDS, 50)},
        {"bad_words": ["the", "a", " in"]},
        {"top_k": rng.randint(1, 20), "top_p": rng.uniform(0.5, 1)},
        {"min_p": rng.uniform(0, 0.2)},
        {"detokenize": False},
    ]
    for extra in rng.sample(extras, rng.choice((0, 0, 1, 2, 3))):
        settings |= extra
    if not settings.get("detokenize", True):
        settings.pop("stop", None)
    return SamplingParams(**settings)


def bound_asks(count: int) -> list[Ask]:
    """Greedy requests whose answers must look like something."""
    constraints: list[dict[str, Any]] = [
        {"regex": r"([a-f]+[0-9]){4,6}"},
        {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 5}},
        {"choice": ["a long choice that takes its time", "a long choice of another kind"]},
    ]
    rng = Random(8)
    asks: list[Ask] = []
    for index in range(count):
        prompt = tuple(rng.choices(range(3, 259), k=rng.randint(3, 40)))
        params = SamplingParams(temperature=0, max_tokens=30, n=1 + index % 2, presence_penalty=0.5 * (index % 3 == 0))
        constraint = StructuredOutputsParams(**constraints[index % len(constraints)])
        asks.append(Ask(prompt, dataclasses.replace(params, structured_outputs=constraint)))
    return asks


def run_alone(engine: Engine, ask: Ask) -> RequestOutput:
    """The request with nothing beside it and nothing cached."""
    engine.reset_prefix_cache()
    (output,) = run_all(engine, [ask])
    return output


def run_all(engine: Engine, asks: Sequence[Ask]) -> list[RequestOutput]:
    """All requests at once, to their ends."""
    drive = Drive(engine, asks)
    for index in range(len(asks)):
        drive.add(index)
    drive.drain()
    return drive.outputs


@dataclass
class Drive:
    """Requests in flight. Outputs are cumulative; the last one of each request stays."""

    engine: Engine
    asks: Sequence[Ask]
    done: dict[int, RequestOutput] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)
    num_steps: int = 0

    @property
    def outputs(self) -> list[RequestOutput]:
        return [self.done[index] for index in range(len(self.asks))]

    def add(self, index: int) -> None:
        ask = self.asks[index]
        self.engine.add_request(f"r{index}", list(ask.prompt), ask.params, priority=ask.priority)

    def abort(self, index: int) -> None:
        output = self.engine.abort_request(f"r{index}")
        if output is not None:
            self.aborted.add(index)
            self.done[index] = output

    def step(self) -> None:
        self.num_steps += 1
        for output in self.engine.step():
            if output.finished:
                self.done[int(output.request_id[1:])] = output

    def drain(self, each: Callable[[], None] = lambda: None) -> None:
        while self.engine.has_work:
            self.step()
            each()


def same_output(one: RequestOutput, other: RequestOutput) -> None:
    """Asserts that two requests came to the same: tokens, texts, reasons."""
    assert [brief(sample) for sample in one.outputs] == [brief(sample) for sample in other.outputs]


def answers_alike(llm: LLM, asks: list[Ask], want: list[RequestOutput]) -> None:
    """Asserts that an engine answers as wanted, preempts and finds prefixes on the way, compiles nothing and holds
    nothing afterwards."""
    for one, other in zip(want, run_all(llm.llm_engine, asks), strict=True):
        same_output(one, other)
    llm.llm_engine.check_integrity()
    stats, gauges = llm.stats(), llm.llm_engine.scheduler_stats()
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0
    assert stats.recompilations == 0
    assert (gauges.num_running, gauges.num_waiting, gauges.pages_owned) == (0, 0, 0)


def brief(sample: Any) -> tuple[Any, ...]:
    return sample.index, sample.token_ids, sample.text, sample.finish_reason, sample.stop_reason


def logprob_bits(output: RequestOutput) -> list[Any]:
    """Every logprob of a request, for comparisons to the last bit."""
    entries = [entry for sample in output.outputs for entry in sample.logprobs or []]
    entries += [entry for entry in output.prompt_logprobs or [] if entry is not None]
    return [[(token, value.logprob, value.rank) for token, value in entry.items()] for entry in entries]


def greedy(ask: Ask) -> Ask:
    return replace(ask, params=_greedy(ask.params))


def _greedy(params: SamplingParams) -> SamplingParams:
    return dataclasses.replace(params, temperature=0.0)


def _tokens(rng: Random, count: int) -> tuple[int, ...]:
    return tuple(rng.choice(TEXT_IDS) for _ in range(count))
