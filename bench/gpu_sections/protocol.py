"""What a section of the GPU benchmark gets and what it yields. Imports nothing of JAX: the driver has no device."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Where a section runs.

    Attributes:
        small: tiny shapes and interpreted kernels, for a machine without a GPU: shows that a section runs, no speed.
        bandwidth: bytes a second that a copy moved in section `limits`; None: not measured.
        matrix_peak: bfloat16 operations a second of a large product there.
    """

    small: bool
    bandwidth: float | None = None
    matrix_peak: float | None = None

    @property
    def kernels(self) -> Literal["pallas", "interpret"]:
        """For `ops.Backend`, and `interpret=` of kernels."""
        return "interpret" if self.small else "pallas"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One time, beside what it could be at best.

    Attributes:
        name: what was measured, its shape included; unique in a section.
        seconds: of one call.
        moved_bytes: that have to be read or written at least.
        operations: multiplications and additions of matrix units.
        tokens: of the step, where there are any: yields tokens a second.
        others: seconds of other ways of doing the same, by name: xla, torch, bf16.
        parts: seconds of its kernels by name, those that take longest, where a profiler saw them.
        error: largest difference to the reference, relative to `allowed`'s scale; None: not checked.
        allowed: what `error` may be.
        target: pass mark of `fraction_of`.
        fraction_of: what the mark is a fraction of: "bandwidth", "peak", "limit" (the nearer of the two), or a name in
            `others`, whose speed is meant.
    """

    name: str
    seconds: float
    moved_bytes: int = 0
    operations: int = 0
    tokens: int = 0
    others: dict[str, float] = field(default_factory=lambda: dict[str, float]())
    parts: dict[str, float] = field(default_factory=lambda: dict[str, float]())
    error: float | None = None
    allowed: float | None = None
    target: float | None = None
    fraction_of: str = "limit"

    def fraction(self, context: Context) -> float | None:
        """How near to the limit, or to another way, this came; None: that was not measured."""
        if self.fraction_of in self.others:
            return self.others[self.fraction_of] / self.seconds
        by_bytes = None if context.bandwidth is None else self.moved_bytes / context.bandwidth
        by_operations = None if context.matrix_peak is None else self.operations / context.matrix_peak
        best = {"bandwidth": [by_bytes], "peak": [by_operations]}.get(self.fraction_of, [by_bytes, by_operations])
        known = [one for one in best if one]
        return max(known) / self.seconds if known else None


class Section(Protocol):
    """A module of `gpu_sections`."""

    def measure(self, context: Context) -> Iterator[Measurement]:
        """Measures; may raise, which ends this section alone."""
        ...
