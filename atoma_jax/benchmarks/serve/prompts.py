"""The requests of a workload: texts or token ids of the lengths asked for, in the words of the server's own tokenizer.

Where the server has `/tokenize` (vLLM, llama.cpp and this project), random prompts of `/v1/completions` are token ids,
of exactly their length. Elsewhere they are words, whose number of tokens is estimated once; what a prompt came to is
in the server's `usage` either way. Few random prompts have any prefix in common.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from atoma_jax.benchmarks.serve.client import Ask, Target, send
from atoma_jax.benchmarks.serve.lengths import SHAREGPT_LONGEST, SHAREGPT_SHORTEST, Length, read_sharegpt
from atoma_jax.errors import AtomaError, UserError

_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city community name president team minute idea "
    "kid body information back parent face others level office door health person art war history party result "
    "change morning reason research girl guy moment air teacher force education foot boy age policy music market "
    "sense river stone paper garden winter summer bridge machine letter window corner engine planet signal forest "
    "island mirror pocket silver yellow "
)
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Lexicon:
    """What is known of a server's tokenizer."""

    ids: tuple[int, ...]  # of ordinary words; empty: the server tells no ids
    tokens_per_word: float


async def read_lexicon(client: httpx.AsyncClient, target: Target) -> Lexicon:
    """Asks the server for the tokens of words, or else counts those of two requests.

    Raises:
        AtomaError: the server answers neither.
    """
    ids = await tokenize(client, target, " ".join(WORDS))
    if ids:
        return Lexicon(ids=tuple(sorted(set(ids))), tokens_per_word=len(ids) / len(WORDS))
    counts: list[int] = []
    for words in (WORDS[:1], WORDS):
        outcome = await send(client, target, Ask(prompt=" ".join(words), prompt_tokens=0, output_tokens=1))
        if outcome.error and not outcome.error.startswith("the stream held no text"):
            raise AtomaError(f"bench serve: a first request to {target.path} failed: {outcome.error}")
        counts.append(outcome.prompt_tokens)
    return Lexicon(ids=(), tokens_per_word=max(1.0, (counts[1] - counts[0]) / (len(WORDS) - 1)))


async def tokenize(client: httpx.AsyncClient, target: Target, text: str) -> list[int]:
    """Token ids of a text by the server's `/tokenize`; empty where it has none."""
    body: dict[str, Any] = {"model": target.model, "prompt": text, "content": text, "add_special_tokens": False}
    try:
        response = await client.post(f"{target.url}/tokenize", json=body)
        tokens: Any = response.json()["tokens"] if response.status_code == 200 else []
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return []
    return tokens if isinstance(tokens, list) and all(isinstance(token, int) for token in tokens) else []


def random_asks(lexicon: Lexicon, lengths: Sequence[Length], *, chat: bool, prefix_len: int, seed: int) -> list[Ask]:
    """Prompts of random tokens or words.

    Args:
        lexicon: of the server.
        lengths: of prompts and answers.
        chat: a conversation has no token ids: words.
        prefix_len: tokens that all prompts begin with, beside their own.
        seed: the same one gives the same prompts.
    """
    rng = np.random.default_rng(seed)
    if lexicon.ids and not chat:
        shared: list[int] = rng.choice(lexicon.ids, size=prefix_len).tolist()
        return [
            Ask(
                prompt=shared + rng.choice(lexicon.ids, size=prompt).tolist(),
                prompt_tokens=prefix_len + prompt,
                output_tokens=answer,
            )
            for prompt, answer in lengths
        ]

    def words(tokens: int) -> list[str]:
        return rng.choice(WORDS, size=max(1, round(tokens / lexicon.tokens_per_word))).tolist()

    first = words(prefix_len) if prefix_len else []
    return [
        Ask(prompt=" ".join(first + words(prompt)), prompt_tokens=prefix_len + prompt, output_tokens=answer)
        for prompt, answer in lengths
    ]


async def sharegpt_asks(
    client: httpx.AsyncClient, target: Target, path: Path, *, count: int, output_len: int | None, seed: int
) -> list[Ask]:
    """Questions of a ShareGPT file, in a random order; answers as long as theirs, or `output_len` tokens.

    Raises:
        UserError: the file has too few of fitting length, or the server cannot count tokens.
    """
    pairs = list(read_sharegpt(path))
    order: Iterable[int] = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    asks: list[Ask] = []
    for question, answer in (pairs[index] for index in order):
        lengths = [len(await tokenize(client, target, text)) for text in (question, answer)]
        if not any(lengths):
            problem = "sharegpt: the server has no /tokenize, which counts the tokens of its answers; try sharegpt-like"
            raise UserError("dataset_name", "sharegpt", problem)
        prompt, wanted = lengths[0], output_len or lengths[1]
        fits = prompt <= SHAREGPT_LONGEST[0] and prompt + wanted <= SHAREGPT_LONGEST[1]
        if fits and min(prompt, wanted) >= SHAREGPT_SHORTEST:
            asks.append(Ask(prompt=question, prompt_tokens=prompt, output_tokens=wanted))
        if len(asks) == count:
            return asks
    raise UserError("num_prompts", count, f"{path} has {len(asks)} conversations of fitting length")
