"""Builds a tokenizer from the metadata of a GGUF file.

Owns the keys `tokenizer.*` and their defaults, which are llama.cpp's. It reads no file (`loading/gguf/file.py`).
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Shaped, UInt8
from tokenizers.models import BPE

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.tokenizer.encoders import SentencePieceEncoder, TokenizersEncoder
from atoma_jax.tokenizer.pre_tokenizers import pre_tokenization
from atoma_jax.tokenizer.sentencepiece_model import sentencepiece_bpe_model
from atoma_jax.tokenizer.tokenizer import END_NAMES, SpecialTokens, Tokenizer, end_token_ids
from atoma_jax.tokenizer.vocabulary import SPECIAL_KINDS, Spelling, TokenKind, Vocabulary, is_byte_text

_Value = TypeVar("_Value")
_KEY = "tokenizer.ggml."
_MARKED = (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED)
_SPM_DEFAULT_IDS = {"bos": 1, "eos": 2, "unknown": 0}


class _Keys:
    """The metadata with checked access; errors name the file and the key."""

    def __init__(self, metadata: Mapping[str, Any], source: str):
        self.metadata = metadata
        self.source = source

    def field(self, key: str) -> str:
        """How errors name a key."""
        return f"{self.source}: {key}"

    def get(self, key: str, kind: type[_Value], default: _Value) -> _Value:
        """The value of a key that may be absent."""
        value = self.metadata.get(key, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise WeightFileError(self.field(key), value, f"must be of type {kind.__name__}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings that must be there."""
        value = self.metadata.get(key)
        if not isinstance(value, list) or not set(map(type, value)) <= {str}:
            raise WeightFileError(self.field(key), value, "must be a list of strings")
        return value

    def numbers(self, key: str, count: int, default: int | float) -> Shaped[np.ndarray, "V"]:
        """An array of `count` numbers, `default` repeated where the key is absent."""
        value = self.metadata.get(key)
        if value is None:
            return np.full(count, default)
        numbers = np.asarray(value)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iuf":
            raise WeightFileError(self.field(key), value, "must be a list of numbers")
        if len(numbers) < count:
            raise WeightFileError(self.field(key), len(numbers), f"must have a value for each of {count} tokens")
        return numbers[:count]

    def token_id(self, role: str, vocab_size: int, default: int | None = None) -> int | None:
        """The id of the token with this role."""
        key = f"{_KEY}{role}_token_id"
        value = self.metadata.get(key)
        if value is None:
            return default if default is not None and default < vocab_size else None
        if not isinstance(value, int) or not 0 <= value < vocab_size:
            raise WeightFileError(self.field(key), value, f"must be a token id in [0, {vocab_size - 1}]")
        return value


def load_gguf_tokenizer(metadata: Mapping[str, Any], *, source: str = "GGUF metadata") -> Tokenizer:
    """The tokenizer that a GGUF file carries.

    Args:
        metadata: keys and values of the file; numeric arrays as numpy arrays or lists, strings as lists.
        source: the file's name, for errors.

    Raises:
        WeightFileError: a key is missing or its value contradicts another.
        UnsupportedModelError: a kind of tokenizer or a pre-tokenizer that is not implemented.
    """
    keys = _Keys(metadata, source)
    model = keys.get(_KEY + "model", str, "")
    if model not in ("gpt2", "llama"):
        known = "gpt2 (byte-level BPE) or llama (sentencepiece BPE)"
        raise UnsupportedModelError(keys.field(_KEY + "model"), model, f"must be {known}")
    return _byte_level(keys) if model == "gpt2" else _sentencepiece(keys)


def _vocabulary(keys: _Keys, spelling: Spelling) -> tuple[Vocabulary, list[str], UInt8[np.ndarray, "V"]]:
    """The vocabulary, and its texts and kinds. Kinds that GGUF does not define count as normal, as in llama.cpp."""
    key = _KEY + "tokens"
    texts = keys.texts(key)
    if not texts:
        raise WeightFileError(keys.field(key), 0, "must hold at least one token")
    if "" in texts:  # no library takes them: llama.cpp's name for them
        texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)]
    given = keys.numbers(_KEY + "token_type", len(texts), TokenKind.NORMAL)
    kinds = np.where(np.isin(given, list(TokenKind)), given, TokenKind.NORMAL).astype(np.uint8)
    vocabulary = Vocabulary(texts, kinds, spelling)
    if len(vocabulary.ids) != len(texts):
        twice = next(text for i, text in enumerate(texts) if vocabulary.ids[text] != i)
        raise WeightFileError(keys.field(key), twice, "must not repeat a token")
    for text in vocabulary.ids_of_kind(TokenKind.BYTE):
        if not is_byte_text(text):
            problem = "a byte token must be spelled <0x00> to <0xFF>"
            raise WeightFileError(keys.field(_KEY + "token_type"), text, problem)
    return vocabulary, texts, kinds


def _control_texts(vocabulary: Vocabulary) -> dict[str, int]:
    """Tokens that are parsed only from rendered templates: control tokens, and what ends an answer by its name.

    The second part follows llama.cpp, which takes such a name for control whatever kind the file gives it.
    """
    ends = {name: i for name in sorted(END_NAMES) if (i := vocabulary.id_of(name)) is not None}
    return vocabulary.ids_of_kind(*SPECIAL_KINDS) | ends


def _user_defined_texts(vocabulary: Vocabulary) -> dict[str, int]:
    """Tokens that are matched in every text."""
    found = vocabulary.ids_of_kind(TokenKind.USER_DEFINED)
    return {text: i for text, i in found.items() if text not in END_NAMES}


def _byte_level(keys: _Keys) -> Tokenizer:
    """A `gpt2` tokenizer: byte-level BPE with a list of merges."""
    pre_key, merges_key = _KEY + "pre", _KEY + "merges"
    pre = pre_tokenization(keys.field(pre_key), keys.get(pre_key, str, "default") or "default")
    vocabulary, _, _ = _vocabulary(keys, Spelling.BYTE_LEVEL)
    merges: list[tuple[str, str]] = []
    for merge in keys.texts(merges_key):
        left, _, right = merge.partition(" ")
        if not left or not right:
            raise WeightFileError(keys.field(merges_key), merge, "a merge must be two tokens with a space between")
        merges.append((left, right))
    try:
        model = BPE(vocab=dict(vocabulary.ids), merges=merges, ignore_merges=pre.ignore_merges)
    except Exception as error:  # the library raises bare exceptions for merges of unknown tokens
        raise WeightFileError(keys.field(merges_key), str(error), "must merge tokens of the vocabulary") from error
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = pre.build()
    control = _control_texts(vocabulary)
    marked = sorted((i, text) for text, i in (control | _user_defined_texts(vocabulary)).items())
    added = [(i, tokenizers.AddedToken(text, normalized=False, special=text in control)) for i, text in marked]
    core.add_tokens([token for _, token in added])
    return Tokenizer(
        vocabulary,
        TokenizersEncoder(core, added),
        _special_tokens(keys, vocabulary, defaults={}, add_bos=pre.add_bos),
        chat_templates=_chat_templates(keys),
        strips_leading_space=False,
    )


def _sentencepiece(keys: _Keys) -> Tokenizer:
    """A `llama` tokenizer: sentencepiece's BPE by scores, with byte tokens for what has no other."""
    add_prefix = keys.get(_KEY + "add_space_prefix", bool, True)
    vocabulary, texts, kinds = _vocabulary(keys, Spelling.METASPACE)
    special = _special_tokens(keys, vocabulary, defaults=_SPM_DEFAULT_IDS, add_bos=True)
    unk_id = keys.token_id("unknown", len(texts), _SPM_DEFAULT_IDS["unknown"])
    assert unk_id is not None  # the default is 0, and there is at least one token
    # Marked tokens are taken out of a text before sentencepiece sees it; as control pieces they take no part in merges.
    piece_kinds = np.where(np.isin(kinds, _MARKED), TokenKind.CONTROL, kinds).astype(np.uint8)
    piece_kinds[unk_id] = TokenKind.UNKNOWN
    model = sentencepiece_bpe_model(
        texts,
        keys.numbers(_KEY + "scores", len(texts), 0.0).astype(np.float32),
        piece_kinds,
        unk_id=unk_id,
        byte_fallback=int((kinds == TokenKind.BYTE).sum()) == 256,
        add_dummy_prefix=add_prefix,
    )
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise WeightFileError(keys.field(_KEY + "tokens"), str(error), "is no vocabulary of sentencepiece") from error
    return Tokenizer(
        vocabulary,
        SentencePieceEncoder(processor, always=_user_defined_texts(vocabulary), control=_control_texts(vocabulary)),
        special,
        chat_templates=_chat_templates(keys),
        strips_leading_space=add_prefix,
    )


def _special_tokens(
    keys: _Keys, vocabulary: Vocabulary, *, defaults: Mapping[str, int], add_bos: bool
) -> SpecialTokens:
    """BOS, the end tokens and padding, and what goes around a prompt. `add_bos` is the default where no key says."""
    ids = {
        role: keys.token_id(role, vocabulary.size, defaults.get(role))
        for role in ("bos", "eos", "eot", "eom", "unknown", "padding")
    }
    explicit = _KEY + "add_bos_token"
    adds_bos = keys.get(explicit, bool, add_bos)
    adds_eos = keys.get(_KEY + "add_eos_token", bool, False)
    bos, eos = ids["bos"], ids["eos"]
    if adds_bos and bos is None and explicit in keys.metadata:
        raise WeightFileError(keys.field(explicit), True, f"needs {_KEY}bos_token_id, which is missing")
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    declared = [found for role in ("eos", "eot", "eom") if (found := ids[role]) is not None]
    return SpecialTokens(
        bos_token_id=bos,
        eos_token_ids=end_token_ids(vocabulary, declared),
        pad_token_id=ids["padding"],
        names={name: vocabulary.text(found) for name, role in roles.items() if (found := ids[role]) is not None},
        prefix=(bos,) if adds_bos and bos is not None else (),
        suffix=(eos,) if adds_eos and eos is not None else (),
    )


def _chat_templates(keys: _Keys) -> dict[str, str]:
    """The file's templates by name: `tokenizer.chat_template`, and `tokenizer.chat_template.NAME` for named ones."""
    key = "tokenizer.chat_template"
    named = {
        name.removeprefix(key + "."): keys.get(name, str, "") for name in keys.metadata if name.startswith(key + ".")
    }
    default = keys.get(key, str, "")
    return {**named, "default": default} if default else named
