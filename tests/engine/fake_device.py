"""A device that remembers what every (page, offset) of the KV holds, and the scheduler driven over it."""

import random
import zlib
from collections import deque

from atoma_jax.engine.admission import SchedulerLimits
from atoma_jax.engine.pages import PagePool
from atoma_jax.engine.plan import Committed, StepPlan, Work
from atoma_jax.engine.prefix_cache import PrefixCache
from atoma_jax.engine.scheduler import Scheduler
from atoma_jax.engine.sequence import Sequence
from atoma_jax.sampling_params import SamplingParams

EOS, STOP, VOCAB = 0, 1, 16


def model(context: list[int], index: int) -> tuple[int, bool]:
    """Next token and whether the logits were finite: a function of every token before it and of the sample."""
    number = zlib.crc32(bytes([*context, index]))
    return number % VOCAB, number // VOCAB % 80 != 0


def alone(seq: Sequence, max_len: int) -> tuple[list[int], str, int | None]:
    """Tokens, finish reason and stop reason of a sequence that nothing else is served with."""
    tokens = seq.tokens[: seq.prompt_len]
    while True:
        token, ok = model(tokens, seq.index)
        if not ok:
            return tokens, "error", None
        tokens.append(token)
        if token == EOS and not seq.params.ignore_eos:
            return tokens, "stop", None
        if token in (seq.params.stop_token_ids or ()):
            return tokens, "stop", token
        if len(tokens) >= max_len:
            return tokens, "length", None


class FakeDevice:
    """Runs plans in the order in which they are made, with KV that can be read back."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.kv: dict[tuple[int, int], tuple[int, int]] = {}  # (page, offset) → (token, position)
        self.last_token: dict[int, int] = {}  # by slot
        self.slot_owner: dict[int, tuple[Sequence, int]] = {}

    def place(self, pages: list[int], position: int) -> tuple[int, int]:
        page = pages[position // self.page_size]
        assert page != 0, "the scratch page was handed out"
        return page, position % self.page_size

    def run(self, plan: StepPlan) -> tuple[list[int], list[bool]]:
        for work in plan.works:
            self.write(work)
        results = [self.read(work) for work in plan.works]
        sampled = [result for result in results if result is not None]
        return [token for token, _ in sampled], [ok for _, ok in sampled]

    def write(self, work: Work) -> None:
        seq = work.seq
        assert seq.slot is not None
        if work.is_first:
            self.slot_owner[seq.slot] = (seq, work.epoch)
        assert self.slot_owner[seq.slot] == (seq, work.epoch), "the sampler state of the slot is another sequence's"
        if work.token_on_device:
            assert work.count == 1
            inputs = [self.last_token[seq.slot]]
        else:
            inputs = seq.tokens[work.start : work.end]
        assert len(inputs) == work.count
        for position, token in enumerate(inputs, work.start):
            self.kv[self.place(seq.pages, position)] = (token, position)

    def read(self, work: Work) -> tuple[int, bool] | None:
        seq = work.seq
        context: list[int] = []
        for position in range(work.end):
            token, written_for = self.kv[self.place(seq.pages, position)]
            assert written_for == position, "a page of another position was read"
            context.append(token)
        known = seq.tokens[: work.end]
        assert context[: len(known)] == known, "foreign KV was read"
        if not work.samples:
            return None
        assert seq.slot is not None
        token, ok = model(context, seq.index)
        self.last_token[seq.slot] = token
        return token, ok


class Harness:
    """Scheduler and device with `depth` steps in flight, checked after every step."""

    def __init__(self, num_pages: int = 64, page_size: int = 4, depth: int = 0, **limits):
        defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128}
        self.limits = SchedulerLimits(**{**defaults, **limits})
        self.pool = PagePool(num_pages, PrefixCache(page_size))
        self.scheduler = Scheduler(self.pool, self.limits)
        self.device = FakeDevice(page_size)
        self.depth = depth
        self.num_steps = 0
        self.check_every = 1
        self.in_flight: deque[tuple[StepPlan, list[int], list[bool]]] = deque()
        self.seqs: list[Sequence] = []
        self.scored: dict[Sequence, list[int]] = {}

    def add(
        self, prompt: list[int], n: int = 1, priority: int = 0, salt: str | None = None, **params
    ) -> list[Sequence]:
        settings = SamplingParams(n=n, **{"max_tokens": 8, "ignore_eos": True, **params})
        name = f"request-{len(self.seqs)}"
        seqs = [
            Sequence(
                request_id=name,
                index=index,
                tokens=list(prompt),
                params=settings,
                eos_ids=frozenset([EOS]),
                priority=priority,
                cache_salt=salt,
            )
            for index in range(n)
        ]
        self.scheduler.add(seqs)
        self.seqs += seqs
        return seqs

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        if plan is not None:
            self.check_plan(plan)
            self.in_flight.append((plan, *self.device.run(plan)))
        return plan

    def commit(self) -> list[Committed]:
        plan, tokens, ok = self.in_flight.popleft()
        news = self.scheduler.commit(plan, [*tokens, 99], [*ok, True])  # a padded row
        for work, row, token in news:
            if work.scores:
                assert token is None
                assert row == sum(other.count for other in plan.prefills[: plan.prefills.index(work)])
                self.scored.setdefault(work.seq, []).extend(range(work.start, work.end))
            else:
                assert plan.sampling[row] is work
                assert token == (tokens[row] if ok[row] else None)
        return news

    def step(self) -> StepPlan | None:
        plan = self.plan()
        if self.in_flight and (plan is None or len(self.in_flight) > self.depth):
            self.commit()
        elif plan is None:
            assert not self.scheduler.has_work, "nothing in flight, and still nothing can be planned"
        self.num_steps += 1
        if self.num_steps % self.check_every == 0:
            self.check()
        return plan

    def drain(self) -> None:
        for _ in range(20_000):
            self.step()
            if not self.scheduler.has_work and not self.in_flight:
                return
        raise AssertionError("the scheduler does not come to an end")

    def check_plan(self, plan: StepPlan) -> None:
        assert 0 < plan.num_tokens <= self.limits.max_num_batched_tokens
        assert len({work.seq for work in plan.works}) == len(plan.works) <= self.limits.max_num_seqs
        assert len({work.seq.slot for work in plan.works}) == len(plan.works)
        assert len(plan.prefills) <= (self.limits.max_prefill_rows or self.limits.max_num_seqs)
        for work in plan.works:
            assert work.end < work.seq.max_len, "KV beyond what the sequence may ever read"
            assert not (work.samples and work.scores)
        if plan.is_scoring:
            assert all(work.scores for work in plan.works)
            assert plan.num_tokens <= self.limits.score_chunk

    def check(self) -> None:
        """The books agree, and every published page holds exactly what its key says."""
        self.scheduler.check_integrity()
        size = self.device.page_size
        for page, prefix in self.pool.cache.contents():
            start = len(prefix) - size
            for offset in range(size):
                assert self.device.kv[page, offset] == (prefix[start + offset], start + offset)

    def check_outputs(self) -> None:
        """Everything has ended as it would have ended alone, and no page is left owned."""
        for seq in self.seqs:
            assert seq.is_finished
            longest = min(self.limits.max_model_len, (self.pool.num_pages - 1) * self.device.page_size + 1)
            tokens, reason, stop_reason = alone(seq, min(longest, seq.prompt_len + seq.params.max_tokens))
            if seq.finish_reason == "abort" or seq.stop_reason == "text":
                assert seq.tokens == tokens[: len(seq.tokens)]
            else:
                assert (seq.tokens, seq.finish_reason, seq.stop_reason) == (tokens, reason, stop_reason)
            wanted = list(range(seq.score_len))
            got = self.scored.get(seq, [])
            assert got == (wanted[: len(got)] if seq.finish_reason == "abort" else wanted)
        assert self.pool.num_free + self.pool.num_cached == self.pool.num_pages - 1
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(2, VOCAB), k=length)


def finite_prompt(length: int, outputs: int, n: int = 1, seed: int = 0) -> list[int]:
    """A prompt after which no sample meets NaN, the end of sequence or the stop token for `outputs` tokens."""
    while True:
        prompt = prompt_of(length, seed)
        if all(_is_quiet(prompt, index, outputs) for index in range(n)):
            return prompt
        seed += 1000


def _is_quiet(prompt: list[int], index: int, outputs: int) -> bool:
    tokens = list(prompt)
    for _ in range(outputs):
        token, ok = model(tokens, index)
        if not ok or token in (EOS, STOP):
            return False
        tokens.append(token)
    return True


# Random traffic
