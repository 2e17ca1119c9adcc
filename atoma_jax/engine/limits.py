"""The limits of a running engine, after every `None` of the configuration was decided. Clients read them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Numbers that hold for the engine's life."""

    model: str  # as the user called it
    max_model_len: int  # tokens of prompt and output together
    vocab_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_logprobs: int
    num_pages: int  # page 0 is scratch
    page_size: int  # tokens
    kv_cache_bytes: int
    weight_bytes: int
    pooling: Literal["last", "mean"] | None = None  # of an engine that turns prompts into vectors; None: it generates
    hidden_size: int = 0  # numbers of such a vector
