"""What every token id means: its text as the model file spells it, its kind, and the exact bytes it stands for.

Owns the two spellings of bytes (GPT-2's byte alphabet and sentencepiece's `▁` with `<0x0A>` tokens). It does not cut
text into tokens (`encoders.py`) and knows no file format (`from_gguf.py`, `from_folder.py`).
"""

from collections.abc import Mapping, Sequence
from enum import Enum, IntEnum

import numpy as np
from jaxtyping import UInt8

from atoma_jax.errors import UserError

METASPACE = "▁"  # U+2581, how sentencepiece writes a space inside a token


class TokenKind(IntEnum):
    """What a token is for; the numbers are those of GGUF's `tokenizer.ggml.token_type` and of sentencepiece."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # parsed only from rendered templates, no part of the answer's text
    USER_DEFINED = 4  # matched in every text before anything else
    UNUSED = 5
    BYTE = 6  # spelled <0x0A>


SPECIAL_KINDS = (TokenKind.CONTROL, TokenKind.UNKNOWN)
_SPECIAL = frozenset(int(kind) for kind in SPECIAL_KINDS)  # as integers: read once a token of every answer
_BYTE = int(TokenKind.BYTE)
_USER_DEFINED = int(TokenKind.USER_DEFINED)


class Spelling(Enum):
    """How the text of a normal token encodes bytes."""

    BYTE_LEVEL = "byte_level"  # one character of GPT-2's alphabet a byte
    METASPACE = "metaspace"  # UTF-8 with ▁ for a space


def byte_alphabet() -> dict[int, str]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes, in order, for U+0100 onwards.

    Source: `bytes_to_unicode` of the GPT-2 release.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# Maps a character of the alphabet to the Latin-1 character of its byte, and every Latin-1 character that is not in the
# alphabet (a space, say) to one above Latin-1, so that encoding to Latin-1 fails for text in another spelling.
_TO_LATIN1 = dict.fromkeys(range(256), 0x10FFFF) | {ord(c): byte for byte, c in byte_alphabet().items()}


class Vocabulary:
    """Texts, kinds and bytes of the tokens 0 … size − 1."""

    def __init__(self, texts: Sequence[str], kinds: UInt8[np.ndarray, "V"], spelling: Spelling):
        """`texts` and `kinds` are indexed by token id; `kinds` holds values of `TokenKind`."""
        assert len(texts) == len(kinds)
        self._texts = texts
        self._kinds: list[int] = kinds.tolist()  # element by element, a list is read faster than an array
        self._spelling = spelling
        self._ids = dict(zip(texts, range(len(texts)), strict=True))
        self.special_ids = frozenset(np.flatnonzero(np.isin(kinds, SPECIAL_KINDS)).tolist())

    @property
    def size(self) -> int:
        """Number of token ids."""
        return len(self._texts)

    @property
    def ids(self) -> Mapping[str, int]:
        """The ids by text; of tokens that share a text, the last."""
        return self._ids

    def ids_of_kind(self, *kinds: TokenKind) -> dict[str, int]:
        """The ids by text of the tokens of these kinds."""
        return {self._texts[i]: i for i in np.flatnonzero(np.isin(self._kinds, kinds)).tolist()}

    def id_of(self, text: str) -> int | None:
        """The id of the token spelled `text`, None if there is none."""
        return self._ids.get(text)

    def text(self, token_id: int) -> str:
        """The token as the model file spells it.

        Raises:
            UserError: no such id.
        """
        self.check(token_id)
        return self._texts[token_id]

    def kind(self, token_id: int) -> int:
        """The token's `TokenKind`. Raises `UserError` for an unknown id."""
        self.check(token_id)
        return self._kinds[token_id]

    def check(self, token_id: int) -> None:
        """Raises `UserError` if no token has this id; a negative index would otherwise count from the end."""
        if not 0 <= token_id < len(self._texts):
            raise UserError("token_ids", int(token_id), f"a token id must be in [0, {len(self._texts) - 1}]")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text; they may be part of a UTF-8 sequence.

        Raises:
            UserError: no such id.
        """
        self.check(token_id)
        text, kind = self._texts[token_id], self._kinds[token_id]
        if kind == _BYTE:
            return bytes((int(text[3:5], 16),))
        if kind in _SPECIAL:
            return text.encode()
        if self._spelling is Spelling.METASPACE:
            return text.replace(METASPACE, " ").encode()
        if kind == _USER_DEFINED:
            return text.encode()
        try:
            return text.translate(_TO_LATIN1).encode("latin-1")
        except UnicodeEncodeError:  # not in the alphabet: an added token that its file calls normal
            return text.encode()


def is_byte_text(text: str) -> bool:
    """Whether the text is spelled like a byte token, `<0x00>` … `<0xFF>`."""
    if len(text) != 6 or not text.startswith("<0x") or text[5] != ">":
        return False
    return all(c in "0123456789ABCDEFabcdef" for c in text[3:5])
