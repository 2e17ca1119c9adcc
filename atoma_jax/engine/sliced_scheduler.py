"""One scheduler over several slices of the devices: each has pages, slots and sequences of its own.

Owns the requests that no slice has yet, in their order, and where each goes: to the slice that knows the longest prefix
of it, or else has the most free pages. A request stays where it was placed, as its pages do. What a slice does with its
sequences is `scheduler.py`'s. All slices step together, as weights and batches are gathered across them.
"""

from bisect import insort
from collections.abc import Sequence as ListLike
from dataclasses import fields, replace
from itertools import count

import numpy as np
from numpy.typing import ArrayLike

from atoma_jax.engine.admission import SchedulerLimits, check_request
from atoma_jax.engine.pages import PagePool
from atoma_jax.engine.plan import Committed, SlicedPlan, StepPlan
from atoma_jax.engine.scheduler import RETRY_AFTER, Scheduler, SchedulerStats
from atoma_jax.engine.sequence import FinishReason, Sequence
from atoma_jax.errors import Overloaded, ParameterError

_IDLE = StepPlan((), ())


class SlicedScheduler:
    """Plans steps over the page pools of several slices; used as a `Scheduler` is."""

    def __init__(self, pools: ListLike[PagePool], limits: SchedulerLimits):
        """`limits` hold for each slice; `max_waiting` for all together."""
        self.limits = limits
        self.schedulers = tuple(Scheduler(pool, replace(limits, max_waiting=None)) for pool in pools)
        self._capacity = (pools[0].num_pages - 1) * pools[0].cache.page_size
        self._homes: dict[str, Scheduler] = {}  # of requests that were placed
        self._unplaced: list[tuple[tuple[int, int], list[Sequence]]] = []  # most urgent first
        self._arrivals = count()

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return sum(scheduler.num_running for scheduler in self.schedulers)

    @property
    def num_waiting(self) -> int:
        """Sequences without one."""
        return sum(scheduler.num_waiting for scheduler in self.schedulers) + sum(len(e[1]) for e in self._unplaced)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._unplaced) or any(scheduler.has_work for scheduler in self.schedulers)

    def stats(self) -> SchedulerStats:
        """Gauges and counters of all slices together."""
        each = [scheduler.stats() for scheduler in self.schedulers]
        sums = {field.name: sum(getattr(one, field.name) for one in each) for field in fields(SchedulerStats)}
        return SchedulerStats(**sums | {"num_waiting": self.num_waiting})

    def add(self, seqs: ListLike[Sequence]) -> None:
        """Queue all samples of one request; they will share a slice. Errors as of `Scheduler.add`."""
        request_id = seqs[0].request_id
        check_request(seqs, self.limits, self._capacity)
        self._forget_finished()
        if request_id in self._homes or any(waiting[0].request_id == request_id for _, waiting in self._unplaced):
            raise ParameterError("request_id", request_id, f"request_id {request_id!r} is in use. Choose another one.")
        most = self.limits.max_waiting
        if most is not None and self.num_waiting + len(seqs) > most:
            raise Overloaded(
                f"{self.num_waiting} sequences wait already and max_waiting is {most}: no room for {len(seqs)} more. "
                "Try again later or raise max_waiting.",
                RETRY_AFTER,
            )
        rank = seqs[0].priority if self.limits.policy == "priority" else 0
        insort(self._unplaced, ((rank, next(self._arrivals)), list(seqs)), key=lambda entry: entry[0])

    def abort(self, request_id: str) -> list[Sequence]:
        """End every unfinished sample of a request and free its pages at once; returns them."""
        for index, (_, seqs) in enumerate(self._unplaced):
            if seqs[0].request_id == request_id:
                del self._unplaced[index]
                for seq in seqs:
                    seq.finish_reason = "abort"
                return seqs
        home = self._homes.pop(request_id, None)
        return [] if home is None else home.abort(request_id)

    def finish(self, seq: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a sequence for a reason that only the caller sees."""
        self.schedulers[seq.home].finish(seq, reason, stop_reason)

    def plan(self) -> SlicedPlan | None:
        """The next step of all slices; None where none of them can do anything."""
        self._place()
        plans = [scheduler.plan() for scheduler in self.schedulers]
        if not any(plans):
            return None
        return SlicedPlan(tuple(plan or _IDLE for plan in plans))

    def commit(self, plan: SlicedPlan, tokens: ArrayLike, ok: ArrayLike) -> list[Committed]:
        """Take in the results of a step, slice by slice. As `Scheduler.commit`, rows counted over all slices."""
        token_rows, ok_rows = np.asarray(tokens), np.asarray(ok)
        news: list[Committed] = []
        first = 0
        for scheduler, part in zip(self.schedulers, plan.slices, strict=True):
            end = first + part.num_results
            if part.works:
                own = scheduler.commit(part, token_rows[first:end], ok_rows[first:end])
                news += [committed._replace(row=first + committed.row) for committed in own]
            first = end
        return news

    def reset_prefix_cache(self) -> None:
        """Forget all shared prefixes."""
        for scheduler in self.schedulers:
            scheduler.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Assert the invariants of every slice. For tests and idle moments: it looks at every page."""
        for index, scheduler in enumerate(self.schedulers):
            scheduler.check_integrity()
            assert all(seq.home == index for seq in scheduler.sequences)
        for _, seqs in self._unplaced:
            assert not any(seq.is_running or seq.is_finished for seq in seqs)

    def _place(self) -> None:
        """Hand requests to slices that have room for them, in order and without skipping."""
        while self._unplaced:
            _, seqs = self._unplaced[0]
            open_ = [scheduler for scheduler in self.schedulers if scheduler.could_admit(seqs[0])]
            if not open_:
                return
            del self._unplaced[0]
            home = max(open_, key=lambda scheduler: (scheduler.known_prefix(seqs[0]), scheduler.spare_pages))
            for seq in seqs:
                seq.home = self.schedulers.index(home)
            home.add(seqs)
            self._homes[seqs[0].request_id] = home

    def _forget_finished(self) -> None:
        finished = [request_id for request_id, home in self._homes.items() if not home.knows(request_id)]
        for request_id in finished:
            del self._homes[request_id]
