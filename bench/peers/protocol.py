"""What a peer must do, so that all do the same work. Imports nothing outside the standard library: peers may live in
other environments than this engine."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How a peer is loaded."""

    model: str  # a .gguf file
    threads: int
    num_seqs: int  # sequences at once, at most
    max_len: int  # tokens of a sequence, prompt and output together, at most
    options: dict[str, str]  # of this peer alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One run, in seconds from handing over the prompts."""

    first_s: float  # until every sequence had its first token
    total_s: float  # until every sequence had its last token
    decoded: int  # tokens that came between the two
    token_ids: list[list[int]]  # what came out


class Peer(Protocol):
    """A loaded engine."""

    description: str  # name, version and what is particular about its setup

    def run(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """Continues all prompts at once, greedily, by exactly `new_tokens` tokens each. Prompts have equal length."""
        ...
