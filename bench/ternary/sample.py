"""Greedy text out of the model, window by window: slow, and without a cache. It shows what was learnt."""

import jax
import numpy as np
from tokenizers import Tokenizer

from bench.ternary.model import Shape, forward
from bench.ternary.text import EOS_ID

_FORWARD = jax.jit(forward, static_argnames=("shape", "quantized"))


def continuation(
    weights: dict[str, np.ndarray], shape: Shape, tokenizer: Tokenizer, prompt: str, *, tokens: int
) -> str:
    """The prompt and its most likely continuation, at most `tokens` tokens and at most one window."""
    ids: list[int] = tokenizer.encode(prompt).ids
    for _ in range(min(tokens, shape.context - len(ids))):
        window = np.zeros((1, shape.context), np.int32)  # one shape: what lies behind is never looked at
        window[0, : len(ids)] = ids
        chosen = int(np.argmax(_FORWARD(weights, window, shape)[0, len(ids) - 1]))
        if chosen == EOS_ID:
            break
        ids.append(chosen)
    return tokenizer.decode(ids, skip_special_tokens=True)
