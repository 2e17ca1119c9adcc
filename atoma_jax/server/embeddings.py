"""Answers of `/v1/embeddings`: vectors of texts or of token ids, as numbers or as base64 of little-endian float32."""

import base64
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from atoma_jax import AsyncLLM
from atoma_jax.outputs import unit_length
from atoma_jax.server.answers import Usage
from atoma_jax.server.errors import Problem
from atoma_jax.server.generation import Generation
from atoma_jax.server.prompts import Prompt
from atoma_jax.server.schemas import EmbeddingRequest

MAX_INPUTS = 2048  # OpenAI's limit


def check_embedding(request: EmbeddingRequest, llm: AsyncLLM) -> None:
    """Raises `Problem` (400) for what cannot be done."""
    if request.encoding_format not in (None, "float", "base64"):
        problem = f"must be float or base64, got {request.encoding_format[:40]!r}"
        raise Problem(400, f"encoding_format: {problem}.", param="encoding_format")
    limits = llm.model_config
    if limits.pooling is not None and request.dimensions not in (None, limits.hidden_size):
        problem = f"must be {limits.hidden_size}, the model's, or left out, got {request.dimensions}"
        raise Problem(400, f"dimensions: {problem}.", param="dimensions")


def check_inputs(prompts: Sequence[Prompt]) -> None:
    """Raises `Problem` (400) for more inputs than one request may bring."""
    if len(prompts) > MAX_INPUTS:
        raise Problem(400, f"input: must be at most {MAX_INPUTS} texts, got {len(prompts)}.", param="input")


async def embed(
    generation: Generation, request: EmbeddingRequest, model: str, count: int, usage: Usage
) -> dict[str, Any]:
    """The whole answer: a vector for each of `count` inputs, in order. `usage` is filled in."""
    vectors: list[Any] = [None] * count
    async with generation:
        async for index, output in generation:
            if output.finished and output.embedding is not None:
                usage.see(index, output, new_tokens=0)
                vector = output.embedding if request.normalize is False else unit_length(output.embedding)
                vectors[index] = _encoded(vector) if request.encoding_format == "base64" else vector.tolist()
    prompt_tokens = sum(usage.prompts.values())
    return {
        "id": f"embd-{secrets.token_hex(8)}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [{"object": "embedding", "index": index, "embedding": item} for index, item in enumerate(vectors)],
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }


def _encoded(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
