"""The scheduler: which positions of which sequences the next step computes.

Owns slots, the running set and the order of work; the pool (pages.py) owns the pages. Pure host code. The loop is

    plan = scheduler.plan()                   # reserves pages and slots, counts the work as dispatched
    ... the step runs ...
    scheduler.commit(plan, tokens, ok)        # appends tokens, publishes and frees pages

Policy: every running decode, then prefill of running sequences, then admission in order without skipping. Whoever lacks
a page takes it from the least urgent sequence (lowest priority, then latest arrival), which loses all its pages and is
computed again later. The first in order can always go on, so everything accepted finishes.

Pipelining. `plan` may be called again before the plan before it is committed, any number of times, as long as the
device runs the steps in the order of their plans and commits follow that order. A decode is then planned by position;
its input token is the last one sampled in its slot (`Work.token_on_device`). Pages and slots are given away as soon as
the host knows that they are not needed, though a step in flight may still use them. This is safe:

* Order. A page freed at any moment is first handed to a step planned later, hence run later. All reads and writes of
  the earlier owner are over by then, and the new owner writes a position before it reads it. The same holds for slots.
* Publication. A stale step (its sequence ended, but the host learnt it too late) writes only at positions the host has
  not committed, hence never in a page that is full with committed tokens; only those are published. The page it writes
  to is unpublished, so it is free, and any later owner fills it after the stale write.
* A sequence with a guide is the exception: what it may go on with follows from its last token, so it is planned once
  that is committed. Where most that run wait so, the step waits with them: rows that take turns would halve their rate.
* Preemption raises `Sequence.epoch`. A token sampled by a step in flight stays valid (its pages were intact in device
  order) and is appended; its pages are not published, as they may be someone else's by then. A sequence is not admitted
  again before all its tokens have arrived.

A page is published by the commit of a step that filled it and, where several chunks make up a prompt, by the commit of
the last: only then have finite logits shown that the pages hold no NaN, and a request that is aborted in the middle of
its prefill leaves nothing behind.
"""

import itertools
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from atoma_jax.engine.admission import SchedulerLimits, check_request
from atoma_jax.engine.pages import PagePool
from atoma_jax.engine.plan import Committed, StepPlan, Work
from atoma_jax.engine.prefix_cache import PrefixCache
from atoma_jax.engine.residency import Residency
from atoma_jax.engine.sequence import FinishReason, Sequence
from atoma_jax.engine.waiting import WaitingQueue
from atoma_jax.errors import Overloaded, ParameterError

RETRY_AFTER = 1.0  # seconds; a full queue moves with every request that finishes


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """A reading of gauges and counters. KV is counted in positions; a shared page counts once."""

    num_running: int
    num_waiting: int
    num_preemptions: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    kv_allocated: int  # in owned pages
    kv_wasted: int  # allocated but neither written nor about to be
    pages_free: int
    pages_cached: int
    pages_owned: int


class _Stuck(NamedTuple):
    """Why the queue's head was not admitted, so that its prompt is not looked up again in every step until then."""

    seq: Sequence
    spare: int  # pages that did not suffice
    missing: bytes | None  # key of the first page not found in the prefix cache

    def still_holds(self, head: Sequence, spare: int, cache: PrefixCache) -> bool:
        return head is self.seq and spare <= self.spare and (self.missing is None or not cache.knows(self.missing))


class Scheduler:
    """Plans steps over one page pool."""

    def __init__(self, pool: PagePool, limits: SchedulerLimits):
        self.pool = pool
        self.limits = limits
        self._cache = pool.cache
        self._page_size = pool.cache.page_size
        self._capacity = (pool.num_pages - 1) * self._page_size
        self._watermark = int(limits.watermark * (pool.num_pages - 1))
        self._max_prefill_rows = limits.max_prefill_rows or limits.max_num_seqs
        self._arrivals = itertools.count()
        self._requests: dict[str, list[Sequence]] = {}  # unfinished samples
        self._waiting = WaitingQueue()
        self._reserves = limits.fixed_chunk is not None  # no preemption: what decode computed cannot be computed again
        self._residency = Residency(pool, self._waiting, limits.max_num_seqs, reserves=self._reserves)
        self._running = self._residency.running
        self._scored_last = False
        self._num_guided = 0  # unfinished
        self._stuck: _Stuck | None = None

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot: new, held back for a sibling's prompt, or preempted."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._requests)

    def stats(self) -> SchedulerStats:
        """Gauges and counters of this moment."""
        allocated = self.pool.num_owned * self._page_size
        wasted = sum(len(seq.pages) * self._page_size - seq.num_dispatched for seq in self._running)
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_preemptions=self._residency.num_preemptions,
            prefix_queried_tokens=self._cache.num_queried_tokens,
            prefix_hit_tokens=self._cache.num_hit_tokens,
            kv_allocated=allocated,
            kv_wasted=wasted,
            pages_free=self.pool.num_free,
            pages_cached=self.pool.num_cached,
            pages_owned=self.pool.num_owned,
        )

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Every unfinished sequence."""
        return (*self._running, *self._waiting)

    def knows(self, request_id: str) -> bool:
        """Whether a request has unfinished samples here."""
        return request_id in self._requests

    @property
    def spare_pages(self) -> int:
        """Pages that neither a prompt under way nor a sequence that waits will take, nor the watermark keeps."""
        prompts = sum(self._residency.pages_lacking(seq) for seq in self._running if seq.prefilling)
        waiting = sum(self._prompt_pages(seq) for seq in self._waiting)
        return self.pool.num_available - prompts - waiting - self._watermark

    def could_admit(self, seq: Sequence) -> bool:
        """Whether a new sequence would not have to wait, as far as slots and pages for its prompt tell."""
        taken = len(self._running) + len(self._waiting)
        return taken == 0 or (taken < self.limits.max_num_seqs and self._prompt_pages(seq) <= self.spare_pages)

    def known_prefix(self, seq: Sequence) -> int:
        """Pages of a new sequence's prompt that are in the prefix cache."""
        if not self.limits.enable_prefix_caching:
            return 0
        chain = self._cache.start(_shared_salt(seq))
        return len(self._cache.lookup(chain, seq.tokens, (len(seq.tokens) - 1) // self._page_size))

    def add(self, seqs: ListLike[Sequence]) -> None:
        """Queue all samples of one request, indices 0 to n − 1. All but the first wait until they can share its prompt.

        A sequence finishes with "length" at `max_tokens`, at `max_model_len`, or when it alone fills the page pool.

        Raises:
            ParameterError: the request can never run, or its id is in use. Nothing was queued.
            Overloaded: the queue is full. Nothing was queued.
        """
        request_id = seqs[0].request_id
        check_request(seqs, self.limits, self._capacity)
        if request_id in self._requests:
            raise ParameterError("request_id", request_id, f"request_id {request_id!r} is in use. Choose another one.")
        max_waiting = self.limits.max_waiting
        if max_waiting is not None and self.num_waiting + len(seqs) > max_waiting:
            raise Overloaded(
                f"{self.num_waiting} sequences wait already and max_num_queued_reqs is {max_waiting}: no room for "
                f"{len(seqs)} more. Try again later or raise max_num_queued_reqs.",
                RETRY_AFTER,
            )
        # A salt of its own lets the samples of a request share their prompt even where requests share nothing.
        private_salt = b"\x01" + request_id.encode("utf-8", "surrogatepass") + b"\x00%d" % next(self._arrivals)
        for seq in seqs:
            seq.arrival = next(self._arrivals)
            seq.order = (seq.priority if self.limits.policy == "priority" else 0, seq.arrival)
            longest = min(self.limits.max_model_len, self._capacity + 1)  # the last token needs no KV
            wanted = seq.params.max_tokens
            seq.max_len = longest if wanted is None else min(longest, seq.prompt_len + wanted)
            if self.limits.enable_prefix_caching:
                seq.salt = _shared_salt(seq)
                # Decode rounds otherwise than prefill: bit-equal outputs share what prefill computed alone.
                seq.share_len = seq.max_len if self.limits.fixed_chunk is None else seq.prompt_len
            else:
                seq.salt = private_salt
                seq.share_len = seq.prompt_len if len(seqs) > 1 else 0
        self._requests[request_id] = list(seqs)
        self._num_guided += sum(seq.guide is not None for seq in seqs)
        self._waiting.add_request(seqs)

    def abort(self, request_id: str) -> list[Sequence]:
        """End every unfinished sample of a request, in whatever state, and free its pages at once; returns them."""
        aborted = list(self._requests.get(request_id, ()))
        for seq in aborted:
            self._end(seq, "abort", None)
        return aborted

    def finish(self, seq: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a sequence for a reason that only the caller sees, such as a stop string. Replaces an earlier reason."""
        if seq.is_finished:
            seq.finish_reason, seq.stop_reason = reason, stop_reason
        else:
            self._end(seq, reason, stop_reason)

    def plan(self) -> StepPlan | None:
        """The next step, with its pages reserved and its work counted as dispatched: it must be run and committed.

        None where nothing can be done: no work, or all of it waits for a plan in flight to be committed.
        """
        if self._num_guided and self._most_wait():
            return None
        # Scoring steps leave every second step to the others, but for prompts that were scored: those go on together.
        if not (self._scored_last and any(map(self._is_held_up, self._running))):
            scoring = self._plan_scoring()
            if scoring is not None:
                return scoring
        self._scored_last = False
        decodes = self._plan_decodes()
        budget = self.limits.max_num_batched_tokens - len(decodes)
        prefills = self._plan_prefills(budget)
        self._admit(budget - sum(work.count for work in prefills), prefills)
        if decodes or prefills:
            return StepPlan(tuple(decodes), tuple(prefills))
        return self._plan_scoring()

    def commit(self, plan: StepPlan, tokens: ArrayLike, ok: ArrayLike) -> list[Committed]:
        """Take in the results of a step; plans are committed in the order in which they were made.

        Args:
            plan: what `plan` returned.
            tokens: integers; row i belongs to `plan.sampling[i]`. May be longer (padding).
            ok: booleans, one a row: its logits were finite. Where not, the sequence ends with "error".

        Returns:
            News in row order, then nothing for sequences that ended meanwhile: their rows are dropped.
        """
        token_list: list[int] = np.asarray(tokens).tolist()
        ok_list: list[bool] = np.asarray(ok).tolist()
        news: list[Committed] = []
        row = 0  # of the results
        for work in plan.decodes:
            if work.seq.finish_reason is None:
                news.append(self._commit_sample(work, row, token_list[row], ok_list[row]))
            row += 1
        for work in plan.prefills:
            seq = work.seq
            if work.samples:
                if seq.finish_reason is None:
                    news.append(self._commit_sample(work, row, token_list[row], ok_list[row]))
                    self._waiting.release_siblings(seq.request_id)
                row += 1
            elif work.scores:
                if seq.finish_reason is None and seq.epoch == work.epoch:
                    seq.num_scored = work.end
                    news.append(Committed(work, row, None))
                row += work.count
        return news

    def reset_prefix_cache(self) -> None:
        """Forget all shared prefixes."""
        self.pool.reset_cache()

    def check_integrity(self) -> None:
        """Assert the invariants of sequences, slots and pages. For tests and idle moments: it looks at every page."""
        self._residency.check_integrity()
        for seq in self._waiting:
            assert not any((seq.is_finished, seq.is_running, seq.pages, seq.num_dispatched))
        unfinished = sorted(seq.arrival for seqs in self._requests.values() for seq in seqs)
        assert unfinished == sorted(seq.arrival for seq in (*self._running, *self._waiting))

    # plan

    def _most_wait(self) -> bool:
        """More than half of what runs cannot be planned before a step in flight is committed."""
        return 2 * sum(seq.waits_for_token for seq in self._running) > len(self._running)

    def _is_held_up(self, seq: Sequence) -> bool:
        """Steps that score keep it from its answer: it does not score, or decodes a token that is not its last."""
        return not seq.score_len if seq.prefilling else seq.num_dispatched + 1 < seq.max_len

    def _plan_decodes(self) -> list[Work]:
        running, size = self._running, self._page_size
        works: list[Work] = []
        index = 0
        while index < len(running):  # preemption shortens the list, but only behind `index`
            seq = running[index]
            index += 1
            position = seq.num_dispatched
            if seq.prefilling or position + 1 >= seq.max_len or (seq.guide is not None and seq.num_pending):
                continue
            if (
                position == len(seq.pages) * size
                and self._residency.grow(seq, position + 1, running[index:]) == position
            ):
                self._residency.preempt(seq)
                continue
            pending = seq.num_pending
            works.append(Work(seq, position, 1, True, False, pending > 0, False, seq.epoch))
            seq.num_dispatched = position + 1
            seq.num_pending = pending + 1
        return works

    def _plan_prefills(self, budget: int) -> list[Work]:
        """Chunks of running sequences. Decodes of this step cannot be preempted any more; later prefills can."""
        prefilling = [seq for seq in self._running if seq.prefilling]
        works: list[Work] = []
        index = 0
        while index < len(prefilling) and budget > 0 and len(works) < self._max_prefill_rows:
            seq = prefilling[index]
            index += 1
            count = self._chunk(seq, budget)
            if count == 0:
                continue
            victims = prefilling[index:]
            reached = self._residency.grow(seq, seq.num_dispatched + count, victims) - seq.num_dispatched
            prefilling[index:] = victims
            if reached == count or (reached > 0 and self._may_cut):
                works.append(self._prefill(seq, reached))
                budget -= reached
        return works

    def _plan_scoring(self) -> StepPlan | None:
        """A step that scores a chunk of each running sequence that wants it, as far as budget and rows reach."""
        running = self._running
        if not any(seq.prefilling and seq.scores_next for seq in running):
            return None
        budget = chunk = min(self.limits.score_chunk, self.limits.max_num_batched_tokens)
        self._admit(budget, [], scoring=True)
        works: list[Work] = []
        index = 0
        while index < len(running) and budget > 0 and len(works) < self._max_prefill_rows:
            seq = running[index]
            index += 1
            if not (seq.prefilling and seq.scores_next):
                continue
            count = min(seq.score_len - seq.num_dispatched, chunk)
            if count > budget and self.limits.fixed_chunk is not None:
                continue
            end = seq.num_dispatched + min(count, budget)
            # Preemption shortens the list, but only behind `index`.
            reached = self._residency.grow(seq, end, running[index:]) - seq.num_dispatched
            if reached <= 0:
                break
            works.append(self._prefill(seq, reached, scores=True))
            budget -= reached
        self._scored_last = bool(works)
        return StepPlan((), tuple(works)) if works else None

    def _admit(self, budget: int, works: list[Work], *, scoring: bool = False) -> None:
        """Move sequences from the queue's head to `_running` and append their first chunks to `works`.

        Those that score first have no such chunk; `scoring`: take no others.
        """
        growing = [seq for seq in self._running if seq.prefilling or self._reserves]
        reserved = sum(map(self._residency.pages_lacking, growing))
        while self._residency.has_free_slot and budget > 0 and len(works) < self._max_prefill_rows:
            seq = self._waiting.head
            if seq is None or seq.num_pending or (scoring and not seq.scores_next):
                return
            spare = self.pool.num_available - reserved
            if self._running and self._stuck is not None and self._stuck.still_holds(seq, spare, self._cache):
                return
            self._residency.take_prefix(seq)
            lacking = self._residency.pages_lacking(seq)
            floor = reserved + (self._watermark if self._running else 0)
            fits = lacking <= self.pool.num_available - floor
            count = 0 if seq.scores_next else self._chunk(seq, budget)
            if not fits or (count == 0 and not seq.scores_next):
                missing = seq.chain.missing if seq.chain is not None else None
                self._stuck = None if fits else _Stuck(seq, spare, missing)
                self._residency.drop_pages(seq)
                return
            self._start(seq)
            if count > 0:
                self._residency.grow(seq, seq.num_dispatched + count, [])
                works.append(self._prefill(seq, count))
                budget -= count
            reserved += self._residency.pages_lacking(seq)

    def _start(self, seq: Sequence) -> None:
        """Give the queue's head a slot and count its cached prefix."""
        self._residency.start(seq)
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_dispatched
            if self.limits.enable_prefix_caching and not seq.scores_next:
                self._cache.num_queried_tokens += seq.prompt_len
                self._cache.num_hit_tokens += seq.num_dispatched

    def _chunk(self, seq: Sequence, budget: int) -> int:
        """Positions of the sequence's next chunk that does not score; 0: none in this step."""
        if seq.scores_next:
            return 0
        start = seq.num_dispatched
        rest = len(seq.tokens) - start
        if start < seq.num_scored < seq.score_len:  # preempted while it scored: compute again up to where scores lack
            rest = seq.num_scored - start
        fixed = self.limits.fixed_chunk
        if fixed is not None:
            rest = min(fixed - start % fixed, rest)
        if self._may_cut or rest > self.limits.max_num_batched_tokens:
            return min(rest, budget)
        return rest if rest <= budget else 0

    def _prompt_pages(self, seq: Sequence) -> int:
        return -(-len(seq.tokens) // self._page_size)

    @property
    def _may_cut(self) -> bool:
        """Whether a chunk may end where budget or pages do."""
        return self.limits.enable_chunked_prefill and self.limits.fixed_chunk is None

    def _prefill(self, seq: Sequence, count: int, scores: bool = False) -> Work:
        """Count a chunk, whose pages are there, as dispatched."""
        start = seq.num_dispatched
        samples = start + count == len(seq.tokens)
        work = Work(seq, start, count, samples, scores, False, seq.is_fresh, seq.epoch)
        seq.is_fresh = False
        seq.num_dispatched = start + count
        if samples:
            seq.prefilling = False
            seq.num_pending += 1
        return work

    # commit

    def _commit_sample(self, work: Work, row: int, token: int, ok: bool) -> Committed:
        """Append the token of an unfinished sequence; `work` may be older than its last preemption."""
        seq = work.seq
        seq.num_pending -= 1
        if not ok:
            self._end(seq, "error", None)
            return Committed(work, row, None)
        if seq.epoch == work.epoch:
            self._residency.publish(seq, work.end)
        seq.tokens.append(token)
        reason, stop_reason = seq.finish_of(token)
        if reason is not None:
            self._end(seq, reason, stop_reason)
        return Committed(work, row, token)

    def _end(self, seq: Sequence, reason: FinishReason, stop_reason: int | str | None) -> None:
        """Finish a sequence and free what it holds."""
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        if seq.is_running:
            self._residency.stop(seq)
        else:
            self._waiting.remove(seq)
        self._num_guided -= seq.guide is not None
        unfinished = self._requests[seq.request_id]
        unfinished.remove(seq)
        if not unfinished:
            del self._requests[seq.request_id]
        if seq.index == 0:
            self._waiting.release_siblings(seq.request_id)


def _shared_salt(seq: Sequence) -> bytes:
    """Of sequences that may share prefixes with other requests."""
    return b"\x00" + (seq.cache_salt or "").encode("utf-8", "surrogatepass")
