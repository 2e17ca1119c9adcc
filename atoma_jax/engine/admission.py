"""Limits of the scheduler, checked once, and the test whether a request can ever be served under them.

Does not decide when a request runs (scheduler.py) and does not check sampling parameters or the range of token ids.
"""

from collections.abc import Sequence as ListLike
from dataclasses import dataclass

from atoma_jax.engine.sequence import Sequence
from atoma_jax.errors import ConfigError, ParameterError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Limits of one scheduler.

    Attributes:
        max_num_seqs: sequences that run at once: slots, and rows of a step.
        max_num_batched_tokens: positions of a step; a decode counts one.
        max_model_len: prompt and outputs of one sequence.
        policy: "fcfs", or "priority": smaller numbers first, then by arrival.
        enable_chunked_prefill: a prompt may be spread over several steps. Without it only the recomputation of a
            preempted sequence that outgrew `max_num_batched_tokens` is, and scoring, which has chunks of its own.
        enable_prefix_caching: share prompt prefixes between requests. Samples of one request always share theirs.
        max_prefill_rows: chunks of prefill in a step; None: no limit but `max_num_seqs`.
        watermark: share of the pages that admission leaves free for the sequences that run.
        max_waiting: sequences that may wait; None: no limit.
        score_chunk: positions of a step that gives prompt log-probabilities.
        fixed_chunk: cut prefill at multiples of this and nowhere else, whatever else is in the step, so that the chunks
            of a request never depend on its neighbours; then outputs are never shared as prefixes, and pages are
            reserved at admission for the longest answer, so that nothing is computed twice in two ways. None: chunks
            fill the budget.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    policy: str = "fcfs"
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    max_prefill_rows: int | None = None
    watermark: float = 0.01
    max_waiting: int | None = None
    score_chunk: int = 256
    fixed_chunk: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_num_seqs", self.max_num_seqs, 1),
            ("max_model_len", self.max_model_len, 2),
            ("score_chunk", self.score_chunk, 1),
        ):
            if value < least:
                raise ConfigError(name, value, f"must be at least {least}")
        for name, limit in (
            ("max_prefill_rows", self.max_prefill_rows),
            ("max_waiting", self.max_waiting),
            ("fixed_chunk", self.fixed_chunk),
        ):
            if limit is not None and limit < 1:
                raise ConfigError(name, limit, "must be at least 1, or None for no limit")
        tokens = self.max_num_batched_tokens
        if tokens < self.max_num_seqs:
            raise ConfigError("max_num_batched_tokens", tokens, f"must be at least max_num_seqs = {self.max_num_seqs}")
        if self.fixed_chunk is not None and self.fixed_chunk > tokens:
            raise ConfigError("fixed_chunk", self.fixed_chunk, f"must be at most max_num_batched_tokens = {tokens}")
        if self.fixed_chunk is not None and not self.enable_chunked_prefill:
            raise ConfigError("fixed_chunk", self.fixed_chunk, "needs enable_chunked_prefill=True")
        if self.policy not in ("fcfs", "priority"):
            raise ConfigError("policy", self.policy, 'must be "fcfs" or "priority"')
        if not 0 <= self.watermark < 1:
            raise ConfigError("watermark", self.watermark, "must be in [0, 1)")


def check_request(seqs: ListLike[Sequence], limits: SchedulerLimits, capacity: int) -> None:
    """Refuse a request that could never run.

    Args:
        seqs: the samples of one request, all with the same prompt, indices 0 to n − 1 in order.
        limits: of the scheduler.
        capacity: positions for which the whole page pool has room.

    Raises:
        ParameterError: the prompt is empty or longer than a limit allows; the message names the limit.
    """
    assert seqs
    assert all(seq.index == i and seq.request_id == seqs[0].request_id for i, seq in enumerate(seqs))
    length = len(seqs[0].tokens)
    assert all(len(seq.tokens) == length for seq in seqs)
    if length == 0:
        raise ParameterError("prompt", 0, "The prompt contains no tokens. At least 1 token is needed.")
    context = (
        f"This model's maximum context length is {limits.max_model_len} tokens. However, your prompt contains {length}"
    )
    if length > limits.max_model_len:
        raise ParameterError(
            "prompt",
            length,
            f"{context} input tokens, which exceeds this limit even without any output tokens. "
            "Please reduce the length of the input prompt.",
        )
    if length == limits.max_model_len:
        raise ParameterError(
            "prompt",
            length,
            f"{context} input tokens, which leaves no room for an output token. "
            "Please reduce the length of the input prompt or raise max_model_len.",
        )
    if length + 1 > capacity:
        raise ParameterError(
            "prompt",
            length,
            f"The KV cache holds {capacity} tokens in all. However, your prompt contains {length} input tokens and "
            "needs room for an output token. Please reduce the length of the input prompt or give the KV cache more "
            "memory.",
        )
    if not limits.enable_chunked_prefill and length > limits.max_num_batched_tokens:
        raise ParameterError(
            "prompt",
            length,
            f"Chunked prefill is off and a step takes {limits.max_num_batched_tokens} tokens. However, your prompt "
            f"contains {length} input tokens. Please reduce the length of the input prompt, raise "
            "max_num_batched_tokens or set enable_chunked_prefill.",
        )
