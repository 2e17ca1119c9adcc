"""What the scheduler hands to the step, and what it hands back after the step: plain immutable records.

Owns no decisions (scheduler.py) and no arrays (batch packing).
"""

from dataclasses import dataclass
from typing import NamedTuple

from atoma_jax.engine.sequence import Sequence


class Work(NamedTuple):
    """Positions `start` to `start + count` of one sequence in one step. A tuple, as 64 of them are built every step.

    Attributes:
        samples: the last position yields a new token.
        scores: prompt log-probabilities of these positions are wanted; such work never samples.
        token_on_device: the one input token is not known to the host yet: it is the last one sampled in the slot.
        is_first: the slot is new to this sequence: its sampler state must be set before the step.
        epoch: of the sequence when this was planned.
    """

    seq: Sequence
    start: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # nobody counts occurrences in a Work
    samples: bool
    scores: bool
    token_on_device: bool
    is_first: bool
    epoch: int

    @property
    def end(self) -> int:
        """First position after this work."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Rows are numbered decodes first, then prefills; each sequence has at most one row.

    A step that scores holds works that score and nothing else, as it runs a program of its own.
    """

    decodes: tuple[Work, ...]
    prefills: tuple[Work, ...]

    @property
    def slices(self) -> "tuple[StepPlan, ...]":
        """One plan for each slice of the devices: this one."""
        return (self,)

    @property
    def works(self) -> tuple[Work, ...]:
        """Every row."""
        return self.decodes + self.prefills

    @property
    def sampling(self) -> tuple[Work, ...]:
        """Rows that yield a token, in the order in which `commit` expects their tokens: decodes, then prefills."""
        return self.decodes + tuple(work for work in self.prefills if work.samples)

    @property
    def is_decode_only(self) -> bool:
        """Every row is one token of a sequence that decodes."""
        return not self.prefills

    @property
    def is_scoring(self) -> bool:
        """Every row wants prompt log-probabilities."""
        return bool(self.prefills) and self.prefills[0].scores

    @property
    def num_tokens(self) -> int:
        """Positions computed by the step."""
        return len(self.decodes) + sum(work.count for work in self.prefills)

    @property
    def num_results(self) -> int:
        """Rows that the step yields: of `sampling`, or the positions that are scored."""
        return self.num_tokens if self.is_scoring else len(self.sampling)


@dataclass(frozen=True, slots=True)
class SlicedPlan:
    """One step of several slices, each of which has its own sequences. Results lie slice by slice."""

    slices: tuple[StepPlan, ...]  # one without work for a slice that idles

    @property
    def works(self) -> tuple[Work, ...]:
        """Every row of every slice."""
        return tuple(work for plan in self.slices for work in plan.works)

    @property
    def num_tokens(self) -> int:
        """Positions computed by the step."""
        return sum(plan.num_tokens for plan in self.slices)


class Committed(NamedTuple):
    """News of one sequence after a step. `work.seq.finish_reason` says whether it goes on.

    Attributes:
        row: of the step's results: index into `StepPlan.sampling`, or the first of the positions that were scored.
        token: appended to the sequence; None for work that scores, and where the logits were not finite.
    """

    work: Work
    row: int
    token: int | None
