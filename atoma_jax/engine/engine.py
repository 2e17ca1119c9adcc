"""`Engine`: requests in, steps, outputs out. One thread calls it; `async_engine.py` shares it between many.

A step is: plan (host) → pack → one jitted call → commit → text. Step N + 1 is dispatched before the tokens of step N
are read, unless `async_scheduling` is off.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any

from atoma_jax.engine.compilations import COMPILATIONS
from atoma_jax.engine.grammars import Grammars
from atoma_jax.engine.limits import EngineLimits
from atoma_jax.engine.plan import Committed, SlicedPlan, StepPlan
from atoma_jax.engine.request import Request, Sample
from atoma_jax.engine.runner import HostOutput, PendingOutput, Runner
from atoma_jax.engine.sampler_state import SamplerShape, SlotRules, bad_word_sequences
from atoma_jax.engine.sampling_rows import Column, RowFlag, encode, setting_flags
from atoma_jax.engine.scheduler import Scheduler, SchedulerStats
from atoma_jax.engine.sequence import Sequence
from atoma_jax.engine.sliced_scheduler import SlicedScheduler
from atoma_jax.engine.stats import EngineStats, StatsRecorder, StepTotals
from atoma_jax.engine.text_stream import TextStream
from atoma_jax.errors import EngineDeadError, ParameterError
from atoma_jax.outputs import RequestMetrics, RequestOutput
from atoma_jax.sampling_params import RequestOutputKind, SamplingParams, validate_prompt
from atoma_jax.tokenizer import Tokenizer

# What a request for a vector asks of the rest of the engine: its prompt, and one step for what would be a token.
EMBEDS = SamplingParams(
    temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
)
Prompt = str | Mapping[str, Any] | ListLike[int]  # text, {"prompt": text}, {"prompt_token_ids": ids}, or ids


@dataclass(frozen=True, slots=True)
class _InFlight:
    plan: StepPlan | SlicedPlan
    output: PendingOutput
    totals: StepTotals  # of steps, this one included


class Engine:
    """The loop over one scheduler and one runner."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        scheduler: Scheduler | SlicedScheduler,
        runner: Runner,
        sampler: SamplerShape,
        model_config: EngineLimits,
        *,
        pipelined: bool,
        seed: int,
        default_params: SamplingParams,
    ):
        """`default_params` are what the model's makers recommend, for requests that say nothing."""
        self.tokenizer, self.model_config, self.default_params = tokenizer, model_config, default_params
        self._scheduler, self._runner, self._sampler = scheduler, runner, sampler
        self._depth = 1 if pipelined else 0
        self.grammars = Grammars(tokenizer, vocab_size=sampler.vocab_size)
        self._seed = seed
        self._num_requests = 0
        self._requests: dict[str, Request] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._totals = StepTotals()
        self._dead: str | None = None
        self._recorder = StatsRecorder()
        self._compilations_at_start = COMPILATIONS.unplanned

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests) or bool(self._in_flight)

    @property
    def is_dead(self) -> bool:
        """A step has failed; nothing more can be done with this engine."""
        return self._dead is not None

    @property
    def num_recompilations(self) -> int:
        """Programs compiled in this process since the engine was ready; 0 unless something is wrong."""
        return COMPILATIONS.unplanned - self._compilations_at_start

    def stats(self) -> EngineStats:
        """Times and counters since the start or `reset_stats`."""
        return self._recorder.read(self._scheduler.stats(), self.num_recompilations)

    def reset_stats(self) -> None:
        """Begins a new reading."""
        self._recorder = StatsRecorder(self._scheduler.stats())
        self._compilations_at_start = COMPILATIONS.unplanned

    def scheduler_stats(self) -> SchedulerStats:
        """Gauges of this moment: running, waiting, pages."""
        return self._scheduler.stats()

    def check(self) -> None:
        """Raises EngineDeadError if the engine is lost, or one of its processes."""
        self._check_alive()
        self._runner.check()

    def when_lost(self, call: Callable[[], None]) -> None:
        """Has `call` called, from another thread, once another process of this engine is lost."""
        self._runner.when_lost(call)

    def check_integrity(self) -> None:
        """Asserts the invariants of sequences, slots and pages; for tests and idle moments."""
        self._scheduler.check_integrity()

    def reset_prefix_cache(self) -> None:
        """Forgets all shared prefixes."""
        self._scheduler.reset_prefix_cache()

    def close(self) -> None:
        """Aborts what is unfinished and gives the device's memory back. Later calls raise `EngineDeadError`."""
        for request_id in list(self._requests):
            self.abort_request(request_id)
        self._in_flight.clear()
        self._dead = "it was shut down"
        self._runner.close()

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        embeds: bool = False,
    ) -> RequestMetrics:
        """Queues a request. Nothing is kept of one that is refused.

        Args:
            request_id: unique among unfinished requests.
            prompt: text, `{"prompt": text}`, `{"prompt_token_ids": ids}`, or token ids.
            params: its settings.
            priority: smaller goes first, under the priority policy.
            cache_salt: prefixes are shared only between requests of equal salt.
            embeds: a vector is asked for, with `EMBEDS` as `params`.

        Returns:
            The request's times, which the engine goes on filling in.

        Raises:
            ParameterError: the prompt or a parameter is outside the limits of this model or engine.
            Overloaded: the queue is full.
            EngineDeadError: an earlier step failed.
        """
        self._check_alive()
        text, ids = self._encode(prompt)
        limits = self.model_config
        _check_task(limits, embeds)
        params.validate_for(vocab_size=limits.vocab_size, max_logprobs=limits.max_logprobs)
        room = 0 if embeds else 1
        validate_prompt(ids, vocab_size=limits.vocab_size, max_model_len=limits.max_model_len, room=room)
        _check_order(priority, cache_salt)
        ids = [int(token) for token in ids]  # arrays bring integers of their own kinds
        samples = [self._sample(request_id, index, ids, params, priority, cache_salt) for index in range(params.n)]
        request = Request(
            request_id, text, params, samples, self._rules(params), self.tokenizer, arrival=time.perf_counter()
        )
        self._scheduler.add([sample.seq for sample in samples])
        self._requests[request_id] = request
        self._num_requests += 1
        self._recorder.prompt_tokens += len(ids)
        return request.metrics

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """Ends a request in whatever state and frees its pages; returns what it had, None if it is not there."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        self._scheduler.abort(request_id)
        request.end_texts()
        return request.output(time.perf_counter())

    def step(self) -> list[RequestOutput]:
        """Dispatches the next step, takes in the one before; returns what is new.

        Raises:
            EngineDeadError: the device failed, or the host's books did. The state was donated to the step that failed,
                so the engine cannot go on.
        """
        self._check_alive()
        begin = time.perf_counter()
        try:
            plan = self._scheduler.plan()
            if plan is not None:
                self._launch(plan)
            if not self._in_flight or (plan is not None and len(self._in_flight) <= self._depth):
                self._recorder.host_seconds += time.perf_counter() - begin
                return []
            done = self._in_flight.popleft()
            wait = time.perf_counter()
            output = done.output.read()
            read = time.perf_counter()
            outputs = self._commit(done, output, read)
        except EngineDeadError as error:  # another process is
            self._dead = str(error)
            raise self._lost() from error
        except Exception as error:
            self._dead = f"a step failed with {type(error).__name__}: {error}"
            raise self._lost() from error
        end = time.perf_counter()
        self._recorder.add_step(
            tokens=done.plan.num_tokens,
            host=(wait - begin) + (end - read),
            device=read - wait,
            stats=self._scheduler.stats(),
        )
        return outputs

    def _launch(self, plan: StepPlan | SlicedPlan) -> None:
        now = time.perf_counter()
        guided: list[Sequence] = []
        for work in plan.works:
            if work.is_first:
                self._begin(work.seq, now)
            if work.seq.guide is not None and work.samples:
                guided.append(work.seq)
        if guided:
            bits = self.grammars.bits([seq.guide for seq in guided if seq.guide is not None])
            self._runner.allow([(seq.home, seq.slot) for seq in guided if seq.slot is not None], bits)
        output = self._runner.launch(plan)
        self._totals = self._totals.plus(plan.num_tokens, output.positions)
        self._in_flight.append(_InFlight(plan, output, self._totals))

    def _begin(self, seq: Sequence, now: float) -> None:
        request = self._requests[seq.request_id]
        request.begin(now, self._totals)
        assert seq.slot is not None
        settings = request.samples[seq.index].settings
        settings[Column.SLOT] = seq.slot
        prompt = seq.tokens[: seq.prompt_len]
        self._runner.take_slot(seq.slot, settings, request.rules, prompt, seq.output_tokens, seq.home)

    def _commit(self, done: _InFlight, output: HostOutput, now: float) -> list[RequestOutput]:
        changed: dict[str, Request] = {}
        gaps: dict[float, int] = {}  # requests with news, by when they had some before
        for news in self._scheduler.commit(done.plan, output.tokens, output.ok):  # pyright: ignore[reportArgumentType]  # own plans
            request = self._requests[news.work.seq.request_id]
            before = request.metrics.last_token_time
            if self._take(request, news, output, now):
                changed[request.request_id] = request
                if before is not None and before != now:  # not the second sample of a step
                    gaps[before] = gaps.get(before, 0) + 1
        self._recorder.add_gaps(now, gaps)
        outputs: list[RequestOutput] = []
        for request_id, request in changed.items():
            if request.params.output_kind is RequestOutputKind.FINAL_ONLY and not request.finished:
                continue
            outputs.append(request.output(now, done.totals))
            if outputs[-1].finished:
                del self._requests[request_id]
        return outputs

    def _take(self, request: Request, news: Committed, output: HostOutput, now: float) -> bool:
        """Takes in one row; whether the caller may see something new."""
        work = news.work
        if work.scores and output.ok[news.row : news.row + work.count].all():
            request.add_scores(work.start, work.count, news.row, output)
            return False
        if work.scores:
            self._scheduler.finish(work.seq, "error")
        if news.token is None:  # the logits were not finite
            if work.seq.guide is not None and work.seq.guide.error is not None:
                self._scheduler.finish(work.seq, "error", work.seq.guide.error)
            request.end_texts()
            return True
        if output.pooled is not None:
            request.embedding = output.pooled[news.row]
            return True
        sample = request.samples[work.seq.index]
        stopped = request.add_token(sample, news.token, news.row, output, now)
        self._recorder.generation_tokens += 1
        if stopped is not None:
            self._scheduler.finish(work.seq, "stop", stopped)
        elif work.seq.guide is not None:
            self._follow(request, sample, news.token)
        return True

    def _follow(self, request: Request, sample: Sample, token: int) -> None:
        """Tells a guide of its sample's token, and ends the sample where nothing that the request allows can follow."""
        seq, guide = sample.seq, sample.seq.guide
        assert guide is not None
        if not seq.is_finished:
            guide.accept(token)
            if guide.is_complete and len(seq.tokens) - seq.prompt_len < request.params.min_tokens:
                self._scheduler.finish(seq, "stop")  # the end's own token is barred until min_tokens
                request.end_texts()
        if guide.error is not None:
            self._scheduler.finish(seq, "error", guide.error)
            request.end_texts()

    def _encode(self, prompt: Any) -> tuple[str | None, list[Any]]:
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        if isinstance(prompt, Mapping):
            known = {"prompt", "prompt_token_ids"}
            if not prompt or not set(prompt) <= known:
                raise ParameterError("prompt", sorted(map(str, prompt)), f"A prompt's keys must be of {sorted(known)}.")
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if ids is None:
                return text, self.tokenizer.encode(text)  # pyright: ignore[reportArgumentType]  # encode refuses others
            return text, _listed(ids)
        return None, _listed(prompt)

    def _sample(
        self, request_id: str, index: int, ids: list[int], params: SamplingParams, priority: int, salt: str | None
    ) -> Sample:
        seq = Sequence(
            request_id=request_id,
            index=index,
            tokens=list(ids),
            params=params,
            eos_ids=self.tokenizer.eos_token_ids,
            priority=priority,
            cache_salt=salt,
        )
        seed = self._seed + self._num_requests if params.seed is None else params.seed
        settings = encode(params, slot=0, seed=seed, sample_index=index)
        if params.structured_outputs is not None:
            seq.guide = self.grammars.guide(params)
            settings[Column.FLAGS] |= RowFlag.MASK
        return Sample(seq, settings, TextStream(self.tokenizer, params) if params.detokenize else None)

    def _rules(self, params: SamplingParams) -> SlotRules | None:
        if not setting_flags(params).needs_slot_row:
            return None
        ends = () if params.ignore_eos else sorted(self.tokenizer.eos_token_ids)
        bad_words = bad_word_sequences(
            params.bad_words, lambda text: self.tokenizer.encode(text, add_special_tokens=False)
        )
        return SlotRules(params, shape=self._sampler, stop_ids=(*ends, *params.stop_token_ids), bad_words=bad_words)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise self._lost()

    def _lost(self) -> EngineDeadError:
        return EngineDeadError(f"The engine is lost: {self._dead}. Build it anew.")


def _check_task(limits: EngineLimits, embeds: bool) -> None:
    """An engine has programs for one of the two."""
    if embeds and limits.pooling is None:
        problem = "This engine generates text and has no programs for embeddings. Start one with runner=pooling."
        raise ParameterError("runner", "generate", problem)
    if not embeds and limits.pooling is not None:
        problem = "This engine was started with runner=pooling and generates no text. Start one without."
        raise ParameterError("runner", "pooling", problem)


def _listed(ids: Any) -> list[Any]:
    if isinstance(ids, bytes) or not isinstance(ids, Iterable):  # iterating bytes would yield integers
        problem = f"A prompt must be text, a mapping or a list of token ids, not {type(ids).__name__}."
        raise ParameterError("prompt", ids, problem)
    return list(ids)


def _check_order(priority: Any, cache_salt: Any) -> None:
    """What the scheduler sorts and hashes by must be of one kind, or it would fail in the middle of a step."""
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise ParameterError("priority", priority, f"priority must be an integer, not {type(priority).__name__}.")
    if cache_salt is not None and not isinstance(cache_salt, str):
        raise ParameterError("cache_salt", cache_salt, f"cache_salt must be text, not {type(cache_salt).__name__}.")
