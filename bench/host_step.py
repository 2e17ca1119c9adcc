"""Host time of a decode step: all but the device, which is replaced by a stub that answers at once.

`python -m bench.host_step --model smollm2-135m-instruct --rows 64` runs the engine's
own loop: plan, pack, commit, text.
Times are the thread's CPU time, which other processes on the machine do not change much.
"""

import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import typer

from atoma_jax import RequestOutputKind, SamplingParams
from atoma_jax.config import CompileConfig
from atoma_jax.engine.admission import SchedulerLimits
from atoma_jax.engine.batch import SlotTables, pack
from atoma_jax.engine.buckets import Buckets, make_buckets
from atoma_jax.engine.engine import Engine
from atoma_jax.engine.limits import EngineLimits
from atoma_jax.engine.pages import PagePool
from atoma_jax.engine.plan import StepPlan
from atoma_jax.engine.prefix_cache import PrefixCache
from atoma_jax.engine.runner import HostOutput
from atoma_jax.engine.sampler_state import SamplerShape
from atoma_jax.engine.scheduler import Scheduler
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.gguf.file import GGUFFile
from atoma_jax.tokenizer import load_gguf_tokenizer

PROMPT_TOKENS = 128
PAGE_SIZE = 16


class StubRunner:
    """Packs every step as the real runner does, and yields random tokens at once."""

    def __init__(self, buckets: Buckets, slots: int, table_width: int, vocab_size: int):
        """The real runner's host side has the same sizes."""
        self._buckets, self._vocab_size = buckets, vocab_size
        self._tables = SlotTables.empty(slots, table_width)
        self._random = np.random.default_rng(0)

    def take_slot(
        self, slot: int, settings: np.ndarray, rules: object, prompt: list[int], outputs: list[int], home: int = 0
    ) -> None:
        """As `Runner.take_slot`, for requests without rules."""
        del rules, prompt, outputs, home
        self._tables.take(slot, settings)

    def launch(self, plan: StepPlan) -> "StubOutput":
        """Packs the plan; the device is skipped."""
        pack(plan, self._buckets.choose(plan), self._tables)
        return StubOutput(self._random.integers(1000, self._vocab_size, len(plan.sampling)))


class StubOutput:
    """A step's results that were there from the start."""

    def __init__(self, tokens: np.ndarray):
        """`tokens` of the rows that sample."""
        self._tokens, self.positions = tokens, len(tokens)

    def read(self) -> HostOutput:
        """Nothing to wait for."""
        return HostOutput(self._tokens, np.ones(len(self._tokens), np.bool_), None, None, None, None)


def stub_engine(
    model: str,
    rows: int,
    steps: int,
    max_model_len: int,
    make_runner: Callable[[Buckets, int, int, int], StubRunner] = StubRunner,
) -> Engine:
    """An engine for `rows` sequences of `steps` tokens each, with a model's tokenizer and no model.

    Args:
        model: a GGUF file, or a name or hub id of one.
        rows: that run at once.
        steps: tokens of an answer, of a prompt of `PROMPT_TOKENS`.
        max_model_len: as the engine's.
        make_runner: the device, from what `StubRunner` takes.
    """
    with GGUFFile.open(resolve(model).path) as file:
        tokenizer = load_gguf_tokenizer(file.metadata)
    tokens = max(512, rows)
    buckets = make_buckets(CompileConfig(), max_num_seqs=rows, max_num_batched_tokens=tokens, growth=2)
    pages = rows * (-(-(PROMPT_TOKENS + steps) // PAGE_SIZE) + 1) + 1
    limits = SchedulerLimits(max_num_seqs=rows, max_num_batched_tokens=tokens, max_model_len=max_model_len)
    runner = make_runner(buckets, rows, max_model_len // PAGE_SIZE, tokenizer.vocab_size)
    return Engine(
        tokenizer,
        Scheduler(PagePool(pages, PrefixCache(PAGE_SIZE)), limits),
        runner,  # pyright: ignore[reportArgumentType]
        SamplerShape(slots=rows, vocab_size=tokenizer.vocab_size, max_model_len=max_model_len),
        EngineLimits(
            model=model,
            max_model_len=max_model_len,
            vocab_size=tokenizer.vocab_size,
            max_num_seqs=rows,
            max_num_batched_tokens=tokens,
            max_logprobs=20,
            num_pages=pages,
            page_size=PAGE_SIZE,
            kv_cache_bytes=0,
            weight_bytes=0,
        ),
        pipelined=True,
        seed=0,
        default_params=SamplingParams(),
    )


def main(model: str = "smollm2-135m-instruct", rows: int = 64, steps: int = 300, max_model_len: int = 8192) -> None:
    """Prints host CPU milliseconds of a decode step as one JSON object: median and 90th percentile."""
    engine = stub_engine(model, rows, steps, max_model_len)
    random, vocab_size = np.random.default_rng(1), engine.model_config.vocab_size
    # As a server asks: what is new in each step.
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    for row in range(rows):
        engine.add_request(str(row), random.integers(1000, vocab_size, PROMPT_TOKENS).tolist(), params)
    seconds: list[float] = []
    while engine.has_work:
        begin = time.thread_time()
        engine.step()
        if engine.scheduler_stats().num_running == rows:
            seconds.append(time.thread_time() - begin)
    decode = sorted(seconds[len(seconds) // 4 :])  # the first quarter holds the steps with prefill
    result = {
        "rows": rows,
        "steps": len(decode),
        "host_ms_median": 1e3 * statistics.median(decode),
        "host_ms_p90": 1e3 * decode[int(0.9 * len(decode))],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
