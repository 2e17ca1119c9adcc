"""Random prompts: the same for the same seed, and so different from one another that no prefix is shared."""

import numpy as np

from atoma_jax.benchmarks.protocol import BenchEngine, Vocabulary
from atoma_jax.errors import ParameterError


def random_prompts(vocabulary: Vocabulary, *, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` prompts of `length` token ids each, without control tokens, drawn uniformly."""
    ordinary = np.setdiff1d(np.arange(vocabulary.vocab_size), np.fromiter(vocabulary.special_ids, np.int64))
    rng = np.random.default_rng(seed)
    return rng.choice(ordinary, size=(count, length)).tolist()


def check_lengths(llm: BenchEngine, *, prompt_tokens: int, output_tokens: int) -> None:
    """Raises `ParameterError` where a prompt and its whole output do not fit into the model."""
    limit = llm.llm_engine.model_config.max_model_len
    if prompt_tokens + output_tokens > limit:
        raise ParameterError(
            "prompt_tokens",
            prompt_tokens,
            f"This model's maximum context length is {limit} tokens. However, {prompt_tokens} prompt tokens and "
            f"{output_tokens} output tokens were asked for. Ask for fewer, or raise max_model_len.",
        )
