"""One sample of one request while the engine works on it.

Owns the tokens, the page table and the counters that say how far the device is. It does not decide anything (the
scheduler does), and it keeps no text and no timestamps (the engine does).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from atoma_jax.engine.guide import Guide
from atoma_jax.engine.prefix_cache import Chain

if TYPE_CHECKING:
    from atoma_jax.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """State of one sample. Positions count tokens from the start of the prompt.

    Three lengths matter. `len(tokens)` is what the host knows: the prompt and the committed outputs. `num_tokens` adds
    the outputs that are sampled on the device and not read yet. `num_dispatched` is how many positions have their KV
    written, or will have once the steps in flight are done; while a sequence decodes it is `num_tokens - 1`.

    Attributes:
        eos_ids: tokens that end the sequence unless `ignore_eos`; reported without a stop reason.
        stop_ids: tokens that end it always; reported as the stop reason.
        guide: follows the tokens of a structured answer: no step is planned before it knows the last one.
        priority: smaller is more urgent; read under the "priority" policy only.
        cache_salt: prefixes are shared only between sequences of equal salt.
        arrival: order of arrival over all sequences of the engine, set by the scheduler.
        max_len: tokens at which it finishes with "length", set by the scheduler.
        share_len: positions below this may be looked up and published in the prefix cache, set by the scheduler.
        slot: row of the per-sequence device state (last token, sampler state) while running.
        pages: page table; page i holds positions from i * page_size.
        chain: how many of the pages are published.
        prefilling: known tokens without KV are left to dispatch, so the next work is a chunk of prefill.
        is_fresh: no work was planned since the slot was assigned.
        epoch: counts preemptions; work planned under an older epoch wrote to pages that are no longer this sequence's.
        num_scored: prompt positions whose prompt log-probabilities are committed.
        num_cached_tokens: prompt tokens found in the prefix cache at first admission; None before that.
    """

    request_id: str
    index: int  # of the sample in its request
    tokens: list[int]
    params: "SamplingParams"
    eos_ids: frozenset[int] = frozenset()
    priority: int = 0
    cache_salt: str | None = None
    home: int = 0  # the slice of the devices that it runs in
    guide: Guide | None = None

    prompt_len: int = field(init=False)
    stop_ids: frozenset[int] = field(init=False)
    score_len: int = field(init=False)  # positions below this get prompt log-probabilities

    arrival: int = 0
    order: tuple[int, int] = (0, 0)  # (priority class, arrival): smaller goes first
    max_len: int = 0
    share_len: int = 0
    salt: bytes = b""

    slot: int | None = None
    pages: list[int] = field(default_factory=lambda: list[int]())
    chain: Chain | None = None
    prefilling: bool = True
    is_fresh: bool = True
    epoch: int = 0
    num_dispatched: int = 0
    num_pending: int = 0  # sampled tokens in flight
    num_scored: int = 0
    num_cached_tokens: int | None = None
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)
        self.stop_ids = frozenset(self.params.stop_token_ids or ())
        # The token after the last prompt position is sampled, so that position has nothing to score. Samples of one
        # request share their prompt: the first one scores it.
        wants_scores = self.params.prompt_logprobs is not None and self.index == 0
        self.score_len = self.prompt_len - 1 if wants_scores else 0

    @property
    def num_tokens(self) -> int:
        """Known tokens and those in flight."""
        return len(self.tokens) + self.num_pending

    @property
    def output_tokens(self) -> list[int]:
        """Committed outputs, a copy."""
        return self.tokens[self.prompt_len :]

    @property
    def is_finished(self) -> bool:
        """It has a finish reason and holds neither slot nor pages."""
        return self.finish_reason is not None

    @property
    def is_running(self) -> bool:
        """It holds a slot and pages."""
        return self.slot is not None

    @property
    def waits_for_token(self) -> bool:
        """Whether its next step depends on a token that the host has not read yet."""
        return self.guide is not None and self.num_pending > 0

    @property
    def scores_next(self) -> bool:
        """Whether the next chunk of prefill gives prompt log-probabilities that nobody has yet."""
        return self.num_scored <= self.num_dispatched < self.score_len

    def finish_of(self, token: int) -> tuple[FinishReason | None, int | None]:
        """Finish reason and stop reason if `token`, just appended, ends the sequence; (None, None) if it goes on."""
        if token in self.eos_ids and not self.params.ignore_eos:
            return "stop", None
        if token in self.stop_ids:
            return "stop", token
        if len(self.tokens) >= self.max_len:
            return "length", None
        return None, None
