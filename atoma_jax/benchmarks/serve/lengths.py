"""How long prompts and answers are, in tokens: drawn from a seed, or read from a file of ShareGPT's form."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atoma_jax.errors import UserError

Length = tuple[int, int]  # of a prompt and of its answer

# ShareGPT as Kwon et al. measured it (PagedAttention, SOSP 2023, section 6.1): mean tokens of prompts and of answers.
_SHAREGPT_MEANS = (161.31, 337.99)
_SHAREGPT_SIGMA = 1.0  # of the logarithm: a long tail, as in their figure 11
SHAREGPT_LONGEST = (1024, 2048)  # tokens of a prompt, and with its answer; the limits that vLLM's benchmark sets
SHAREGPT_SHORTEST = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomLengths:
    """Uniform between 1 − `range_ratio` and 1 + `range_ratio` times a length."""

    input_len: int = 128
    output_len: int = 128
    range_ratio: float = 0.0

    def draw(self, count: int, seed: int) -> list[Length]:
        """`count` pairs."""
        rng = np.random.default_rng(seed)
        columns = [self._column(length, count, rng) for length in (self.input_len, self.output_len)]
        return list(zip(*columns, strict=True))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and answer together."""
        return sum(self._bounds(length)[1] for length in (self.input_len, self.output_len))

    def _bounds(self, length: int) -> Length:
        return max(1, int(length * (1 - self.range_ratio))), max(1, int(length * (1 + self.range_ratio)))

    def _column(self, length: int, count: int, rng: np.random.Generator) -> list[int]:
        low, high = self._bounds(length)
        return rng.integers(low, high + 1, size=count).tolist()


def sharegpt_like_lengths(count: int, seed: int, *, longest: int | None) -> list[Length]:
    """Log-normal lengths with ShareGPT's means, then cut to its benchmark's limits and to `longest` tokens."""
    rng = np.random.default_rng(seed)
    prompt_limit, total_limit = SHAREGPT_LONGEST
    total_limit = min(total_limit, longest or total_limit)
    if total_limit < 2 * SHAREGPT_SHORTEST:
        raise UserError("dataset_name", longest, "sharegpt-like: the model takes fewer than 8 tokens in all")
    prompt_limit = min(prompt_limit, total_limit - SHAREGPT_SHORTEST)
    pairs: list[Length] = []
    for row in rng.normal(0.0, _SHAREGPT_SIGMA, size=(count, 2)):
        prompt, answer = (
            round(mean * float(np.exp(value - _SHAREGPT_SIGMA**2 / 2)))
            for mean, value in zip(_SHAREGPT_MEANS, row, strict=True)
        )
        prompt = min(max(prompt, SHAREGPT_SHORTEST), prompt_limit)
        pairs.append((prompt, min(max(answer, SHAREGPT_SHORTEST), total_limit - prompt)))
    return pairs


def read_sharegpt(path: Path) -> Iterator[tuple[str, str]]:
    """First question and answer of every conversation in a file of ShareGPT's form.

    Raises:
        UserError: it cannot be read, or is no such file.
    """
    try:
        conversations: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError("dataset_path", str(path), f"cannot be read as JSON ({error})") from error
    if not isinstance(conversations, list):
        raise UserError("dataset_path", str(path), "must hold a list of conversations")
    for conversation in conversations:
        turns: Any = conversation.get("conversations", []) if isinstance(conversation, dict) else []
        texts: list[Any] = [turn.get("value") for turn in turns[:2] if isinstance(turn, dict)]
        if len(texts) == 2 and all(isinstance(text, str) and text for text in texts):
            yield texts[0], texts[1]
