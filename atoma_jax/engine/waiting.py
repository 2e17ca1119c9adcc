"""Sequences without a slot, in the order in which they are admitted.

Owns that order, and holds the samples of a request back until the first one's prompt can be shared with them. It does
not decide whether the head is admitted (scheduler.py).
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from collections.abc import Sequence as ListLike

from atoma_jax.engine.sequence import Sequence


def by_order(seq: Sequence) -> tuple[int, int]:
    """Sort key: priority class, then arrival. A preempted sequence thereby returns to the front of its class."""
    return seq.order


class WaitingQueue:
    """Sorted by `Sequence.order`. A list, not a heap: insertion moves 8 bytes a sequence, and any one can leave."""

    def __init__(self) -> None:
        self._queue: list[Sequence] = []
        self._held: dict[str, list[Sequence]] = {}  # by request

    def __len__(self) -> int:
        return len(self._queue) + sum(map(len, self._held.values()))

    def __bool__(self) -> bool:
        return bool(self._queue or self._held)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._queue
        for siblings in self._held.values():
            yield from siblings

    @property
    def head(self) -> Sequence | None:
        """The next sequence to admit."""
        return self._queue[0] if self._queue else None

    def add_request(self, seqs: ListLike[Sequence]) -> None:
        """Queue the first sample of a new request and hold the others back."""
        self.push(seqs[0])
        if len(seqs) > 1:
            self._held[seqs[0].request_id] = list(seqs[1:])

    def release_siblings(self, request_id: str) -> None:
        """Queue the samples that were held back, if any."""
        for seq in self._held.pop(request_id, ()):
            self.push(seq)

    def push(self, seq: Sequence) -> None:
        """Queue a sequence at its place."""
        insort(self._queue, seq, key=by_order)

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence, wherever it waits."""
        index = bisect_left(self._queue, seq.order, key=by_order)
        if index < len(self._queue) and self._queue[index] is seq:
            del self._queue[index]
            return
        siblings = self._held[seq.request_id]
        siblings.remove(seq)
        if not siblings:
            del self._held[seq.request_id]
