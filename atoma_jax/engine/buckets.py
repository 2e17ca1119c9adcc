"""The fixed shapes of an engine's steps: which programs there are, and which one a plan takes.

No JAX here: the list is part of the configuration and is printed at start.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from atoma_jax.config import CompileConfig
from atoma_jax.engine.plan import StepPlan
from atoma_jax.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Program:
    """One compiled step.

    Attributes:
        kind: decode: one token a row. mixed: decodes and chunks of prefill. score: chunks of prefill, all of whose
            positions yield logits. pool: whole prompts, each of which yields a vector.
        tokens: T, positions computed.
        rows: B, sequences.
    """

    kind: Literal["decode", "mixed", "score", "pool"]
    tokens: int
    rows: int

    @property
    def logit_rows(self) -> int:
        """Positions whose logits are computed."""
        return self.tokens if self.kind == "score" else self.rows

    def __str__(self) -> str:
        return f"{self.kind}-{self.tokens}x{self.rows}"


@dataclass(frozen=True, slots=True)
class Buckets:
    """All programs of an engine, each kind from small to large."""

    decode: tuple[Program, ...]
    mixed: tuple[Program, ...]
    score: Program | None
    pool: tuple[Program, ...] = ()  # of an engine that pools, which has no others

    @property
    def programs(self) -> tuple[Program, ...]:
        """The programs that first steps need come first, then by size."""
        return (*self.mixed, *self.decode, *self.pool, *((self.score,) if self.score else ()))

    @property
    def smallest(self) -> Program:
        """The program with the least work."""
        return (self.decode or self.pool)[0]

    def choose(self, plan: StepPlan) -> Program:
        """The smallest program that holds `plan`."""
        if plan.is_scoring:
            assert self.score is not None
            return self.score
        if self.pool:
            return next(program for program in self.pool if program.tokens >= plan.num_tokens)
        if plan.is_decode_only:
            return next(program for program in self.decode if program.rows >= len(plan.decodes))
        return next(program for program in self.mixed if program.tokens >= plan.num_tokens)

    def choose_for(self, plans: Sequence[StepPlan]) -> Program:
        """The smallest program that holds each of several plans; either all of them score that have work, or none."""
        if any(plan.is_scoring for plan in plans):
            assert self.score is not None
            return self.score
        chosen = [self.choose(plan) for plan in plans]
        return max(chosen, key=lambda program: (program.kind == "mixed", program.tokens))


def make_buckets(
    config: CompileConfig, *, max_num_seqs: int, max_num_batched_tokens: int, growth: int, pooling: bool = False
) -> Buckets:
    """The programs that a configuration asks for; where it does not say, rows grow by the factor `growth`.

    Raises:
        ConfigError: the sizes given do not reach the limits of the scheduler.
    """
    if config.deterministic:
        all_rows, all_tokens = (max_num_seqs,), (max_num_batched_tokens,)
    else:
        all_rows, all_tokens = _rising(max_num_seqs, growth), _two_sizes(max_num_seqs, max_num_batched_tokens)
    rows, tokens = config.decode_rows or all_rows, config.prefill_tokens or all_tokens
    if rows[-1] != max_num_seqs:
        raise ConfigError("decode_rows", rows, f"must end with max_num_seqs = {max_num_seqs}")
    if tokens[-1] != max_num_batched_tokens:
        raise ConfigError("prefill_tokens", tokens, f"must end with max_num_batched_tokens = {max_num_batched_tokens}")
    if tokens[0] < max_num_seqs:
        raise ConfigError("prefill_tokens", tokens, f"must hold the {max_num_seqs} rows of max_num_seqs each")
    if pooling:
        return Buckets((), (), None, pool=tuple(Program("pool", size, max_num_seqs) for size in tokens))
    return Buckets(
        decode=tuple(Program("decode", size, size) for size in rows),
        mixed=tuple(Program("mixed", size, max_num_seqs) for size in tokens),
        score=Program("score", min(config.score_tokens, max_num_batched_tokens), max_num_seqs),
    )


def _rising(limit: int, growth: int) -> tuple[int, ...]:
    sizes = [1]
    while sizes[-1] * growth < limit:
        sizes.append(sizes[-1] * growth)
    return (*sizes, limit) if sizes[-1] < limit else (limit,)


def _two_sizes(rows: int, limit: int) -> tuple[int, ...]:
    """A short prompt's and the limit."""
    return tuple(sorted({max(rows, limit // 4), limit}))
