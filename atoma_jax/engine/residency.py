"""Slots and pages of the sequences that run.

Owns the running set and everything that gives a sequence a slot or a page or takes one away: cached prefixes, growth,
preemption, publication. It does not decide who runs or what a step computes (scheduler.py).
"""

from bisect import insort

from atoma_jax.engine.pages import PagePool
from atoma_jax.engine.sequence import Sequence
from atoma_jax.engine.waiting import WaitingQueue, by_order


class Residency:
    """The running sequences, most urgent first, on top of a page pool. Those that it preempts go back to `waiting`."""

    def __init__(self, pool: PagePool, waiting: WaitingQueue, max_num_seqs: int, *, reserves: bool = False):
        """`reserves`: a sequence is admitted with room for its longest answer, so that nobody is ever preempted."""
        self.running: list[Sequence] = []  # sorted by Sequence.order
        self.num_preemptions = 0
        self._pool = pool
        self._waiting = waiting
        self._page_size = pool.cache.page_size
        self._max_num_seqs = max_num_seqs
        self._reserves = reserves
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))

    @property
    def has_free_slot(self) -> bool:
        """Whether one more sequence can run."""
        return bool(self._free_slots)

    def start(self, seq: Sequence) -> None:
        """Give a waiting sequence a slot."""
        self._waiting.remove(seq)
        seq.slot = self._free_slots.pop()
        seq.is_fresh = True
        insort(self.running, seq, key=by_order)

    def stop(self, seq: Sequence) -> None:
        """Take slot and pages from a running sequence."""
        assert seq.slot is not None
        self.running.remove(seq)
        self._free_slots.append(seq.slot)
        seq.slot = None
        self.drop_pages(seq)

    def preempt(self, seq: Sequence) -> None:
        """Stop a running sequence in favour of another; it will be computed again."""
        self.stop(seq)
        seq.prefilling = True
        seq.epoch += 1
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.push(seq)

    def take_prefix(self, seq: Sequence) -> None:
        """Own the cached pages of the longest known prefix.

        The last token is always computed, as its logits are needed, and so is what still has to be scored.
        """
        cache = self._pool.cache
        limit = min(len(seq.tokens) - 1, seq.share_len)
        if seq.num_scored < seq.score_len:
            limit = min(limit, seq.num_scored)
        seq.chain = cache.start(seq.salt)
        seq.pages = cache.lookup(seq.chain, seq.tokens, limit // self._page_size)
        for page in seq.pages:
            self._pool.retain(page)
        seq.num_dispatched = len(seq.pages) * self._page_size

    def drop_pages(self, seq: Sequence) -> None:
        """Release every page of a sequence."""
        self._pool.release_all(seq.pages)
        seq.pages = []
        seq.chain = None
        seq.num_dispatched = 0

    def pages_lacking(self, seq: Sequence) -> int:
        """Pages to add before every known token has a place, or every token that may come where pages are reserved."""
        end = seq.max_len - 1 if self._reserves else len(seq.tokens)  # the last token needs no KV
        return max(0, -(-end // self._page_size) - len(seq.pages))

    def grow(self, seq: Sequence, end: int, victims: list[Sequence]) -> int:
        """Add pages up to position `end`; where they run out, preempt from the tail of `victims`, which is consumed.

        Returns:
            `end`, or how far the pages reach where there were not enough.
        """
        while len(seq.pages) * self._page_size < end:
            if self._pool.num_available:
                seq.pages.append(self._pool.allocate())
            elif victims:
                self.preempt(victims.pop())
            else:
                return len(seq.pages) * self._page_size
        return end

    def publish(self, seq: Sequence, end: int) -> None:
        """Publish the full pages below position `end`, whose KV is committed."""
        chain, size = seq.chain, self._page_size
        assert chain is not None
        num_full = min(end, seq.share_len) // size
        while chain.num_pages < num_full and chain.is_open:
            start = chain.num_pages * size
            self._pool.cache.publish(chain, seq.tokens[start : start + size], seq.pages[chain.num_pages])

    def check_integrity(self) -> None:
        """Assert the invariants of slots and pages."""
        self._pool.check_integrity(seq.pages for seq in self.running)
        slots = [seq.slot for seq in self.running if seq.slot is not None] + self._free_slots
        assert sorted(slots) == list(range(self._max_num_seqs))
        assert self.running == sorted(self.running, key=by_order)
        for seq in self.running:
            assert not seq.is_finished
            assert seq.num_dispatched <= len(seq.pages) * self._page_size
            assert seq.prefilling or seq.num_dispatched == seq.num_tokens - 1
