"""From text to token ids, by the two libraries that do it: `tokenizers` and `sentencepiece`.

Owns which marked tokens are looked for in a text: tokens defined by the user always, control tokens only on request. It
adds no BOS or EOS (`tokenizer.py`) and reads no files.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

import sentencepiece
import tokenizers
from tokenizers.models import WordLevel


@runtime_checkable
class Encoder(Protocol):
    """Cuts text into token ids. Safe to use from several threads."""

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """The ids of `text`, which holds no lone surrogate; control tokens are recognised with `parse_special` only."""
        ...


class MarkedTokenSplitter:
    """Finds marked tokens in a text, leftmost and longest first, in linear time (an Aho-Corasick automaton).

    The automaton is the one that `tokenizers` uses for added tokens; an alternation in `re` takes seconds for the six
    thousand control tokens of a Gemma vocabulary.
    """

    _REST = "\U0010fffe"  # a noncharacter that no vocabulary holds

    def __init__(self, ids: Mapping[str, int]):
        """`ids` maps the text of each marked token, never empty, to its id."""
        self._automaton = tokenizers.Tokenizer(WordLevel(vocab={self._REST: 0}, unk_token=self._REST))
        self._automaton.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ids])
        self._ids = [-1, *ids.values()]  # by the automaton's own numbering: 0 is unmarked text

    def split(self, text: str) -> list[str | int]:
        """The text in order: runs without a marked token as strings, marked tokens as ids."""
        found = self._automaton.encode(text, add_special_tokens=False)
        return [
            self._ids[mark] if mark else text[start:end]
            for mark, (start, end) in zip(found.ids, found.offsets, strict=True)
        ]


class SentencePieceEncoder:
    """Sentencepiece, with marked tokens taken out of the text first."""

    def __init__(
        self,
        processor: sentencepiece.SentencePieceProcessor,
        *,
        always: Mapping[str, int],
        control: Mapping[str, int],
    ):
        """`always` are the marked tokens found in every text, `control` those found with `parse_special` only.

        A processor that puts a space before a text (`add_dummy_prefix`) does so after every marked token too, as
        llama.cpp and the legacy behaviour of `transformers` do.
        """
        self._processor = processor
        self._plain = MarkedTokenSplitter(always)
        self._special = MarkedTokenSplitter({**always, **control})

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """As `Encoder.encode`."""
        splitter = self._special if parse_special else self._plain
        ids: list[int] = []
        for part in splitter.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(self._processor.encode(part))
        return ids


class TokenizersEncoder:
    """The `tokenizers` library, with added tokens that are either user-defined or special (control)."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, added: Iterable[tuple[int, tokenizers.AddedToken]]):
        """`tokenizer` holds the `added` tokens (id, token) already; its setting for special tokens is changed."""
        self._special = tokenizer
        self._plain = _twin(tokenizer, added)
        self._special.encode_special_tokens = False
        self._plain.encode_special_tokens = True  # as text: control tokens are no part of a user's language

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """As `Encoder.encode`."""
        tokenizer = self._special if parse_special else self._plain
        return tokenizer.encode(text, add_special_tokens=False).ids


def _twin(tokenizer: tokenizers.Tokenizer, added: Iterable[tuple[int, tokenizers.AddedToken]]) -> tokenizers.Tokenizer:
    """A second tokenizer over the same model: whether special tokens are parsed is state of the object.

    The vocabulary and merges are shared where the added tokens get their ids again, as they do in order without gaps.
    """
    twin = tokenizers.Tokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        twin.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        twin.pre_tokenizer = tokenizer.pre_tokenizer
    in_order = sorted(added, key=lambda item: item[0])
    twin.add_tokens([token for _, token in in_order])  # all at once: each call rebuilds the automaton
    if all(twin.token_to_id(token.content) == token_id for token_id, token in in_order):
        return twin
    return tokenizers.Tokenizer.from_str(tokenizer.to_str())
