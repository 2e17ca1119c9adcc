"""Decoding a stream of tokens: text comes out as soon as it is certain, never a part of a character.

Owns what is held back between two tokens. Stop strings are the engine's.
"""

import codecs
from collections.abc import Sequence

from atoma_jax.tokenizer.tokenizer import Tokenizer


class IncrementalDecoder:
    """The text of one answer, token by token, in time linear in its length.

    At most three bytes, the beginning of a UTF-8 sequence, are held back. The pieces joined equal `Tokenizer.decode` of
    all the ids, however they were cut.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, continues: bool = False):
        """`continues` as in `Tokenizer.decode`: True for the answer to a prompt."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._strips_space = tokenizer.strips_leading_space and not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete, perhaps none.

        Raises:
            UserError: an id outside the vocabulary; nothing was taken in.
        """
        data = self._tokenizer.text_bytes(ids, skip_special_tokens=self._skip_special_tokens)
        if self._strips_space and data:
            data = data.removeprefix(b" ")
            self._strips_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The rest at the end of an answer: U+FFFD if it stopped inside a character."""
        return self._utf8.decode(b"", final=True)
