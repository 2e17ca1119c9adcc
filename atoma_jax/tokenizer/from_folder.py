"""Builds a tokenizer from the files of a Hugging Face folder: `tokenizer.json`, or sentencepiece's `tokenizer.model`.

Owns which files say what, and the limits of their sizes. Nothing in a folder is executed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from atoma_jax.errors import ModelNotFoundError, UnsupportedModelError, WeightFileError
from atoma_jax.tokenizer.encoders import SentencePieceEncoder, TokenizersEncoder
from atoma_jax.tokenizer.tokenizer import SpecialTokens, Tokenizer, end_token_ids
from atoma_jax.tokenizer.vocabulary import SPECIAL_KINDS, Spelling, TokenKind, Vocabulary, is_byte_text

_MEBIBYTE = 1 << 20
_LIMITS = {  # bytes; several times the largest published file of each name
    "tokenizer.json": 128 * _MEBIBYTE,
    "tokenizer.model": 64 * _MEBIBYTE,
    "tokenizer_config.json": 16 * _MEBIBYTE,
    "generation_config.json": _MEBIBYTE,
    "chat_template.jinja": _MEBIBYTE,
}
_MAX_VOCABULARY = 1 << 22
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def load_folder_tokenizer(folder: Path, *, rows: int | None = None) -> Tokenizer:
    """The tokenizer of a model folder; `tokenizer.json` wins over `tokenizer.model`.

    Args:
        folder: in HF layout.
        rows: of the model's embedding, which many models pad: ids behind the last token are unused. None: as many as
            there are tokens.

    Raises:
        ModelNotFoundError: neither file is there.
        WeightFileError: a file is too large, damaged, or contradicts another.
        UnsupportedModelError: a decoder that is neither byte-level nor sentencepiece's.
    """
    config = _Config.read(folder)
    if (folder / "tokenizer.json").is_file():
        return _from_json(folder / "tokenizer.json", config, rows)
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder / "tokenizer.model", config, rows)
    raise ModelNotFoundError("tokenizer", str(folder), "the folder must hold tokenizer.json or tokenizer.model")


def _read_bytes(path: Path) -> bytes:
    """A file's content, refused if it is larger than any honest file of its name."""
    limit = _LIMITS[path.name]
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise WeightFileError(str(path), error.strerror, "must be a readable file") from error
    if len(data) > limit:
        raise WeightFileError(str(path), path.stat().st_size, f"must have at most {limit} bytes")
    return data


def _read_text(path: Path) -> str:
    """A text file in UTF-8."""
    try:
        return _read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise WeightFileError(str(path), error.reason, "must be UTF-8") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an absent file is an empty one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise WeightFileError(str(path), str(error), "must be JSON") from error
    if not isinstance(value, dict):
        raise WeightFileError(str(path), type(value).__name__, "must be a JSON object")
    return value


@dataclass(frozen=True, slots=True)
class _Config:
    """What the folder's JSON files say about its tokenizer."""

    path: Path  # of tokenizer_config.json, for errors
    tokenizer: Mapping[str, Any]
    generation: Mapping[str, Any]
    template_file: str | None

    @classmethod
    def read(cls, folder: Path) -> "_Config":
        """Reads the folder's files, each of which may be absent."""
        template = folder / "chat_template.jinja"
        return cls(
            folder / "tokenizer_config.json",
            _read_json(folder / "tokenizer_config.json"),
            _read_json(folder / "generation_config.json"),
            _read_text(template) if template.is_file() else None,
        )

    def names(self) -> dict[str, str]:
        """The marked tokens by role, each a string or an object with `content`."""
        names: dict[str, str] = {}
        for role in _ROLES:
            value = self.tokenizer.get(role)
            content = value.get("content") if isinstance(value, dict) else value
            if content is None:
                continue
            if not isinstance(content, str):
                raise WeightFileError(f"{self.path}: {role}", value, "must be a string or an object with 'content'")
            names[role] = content
        return names

    def flag(self, name: str) -> bool | None:
        """A setting that may be absent."""
        value = self.tokenizer.get(name)
        if value is not None and not isinstance(value, bool):
            raise WeightFileError(f"{self.path}: {name}", value, "must be true or false")
        return value

    def end_ids(self, vocab_size: int) -> list[int]:
        """`eos_token_id` of generation_config.json: a number or a list."""
        value = self.generation.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
                field = f"{self.path.with_name('generation_config.json')}: eos_token_id"
                raise WeightFileError(field, token_id, f"must be a token id in [0, {vocab_size - 1}]")
        return ids

    def chat_templates(self) -> dict[str, str]:
        """Templates by name: `chat_template.jinja`, else `chat_template`, a string or a list of named ones."""
        if self.template_file is not None:
            return {"default": self.template_file}
        value = self.tokenizer.get("chat_template")
        if value is None:
            return {}
        if isinstance(value, str):
            return {"default": value}
        templates: dict[str, str] = {}
        for item in value if isinstance(value, list) else [value]:
            name, source = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
            if not isinstance(name, str) or not isinstance(source, str):
                problem = "must be a string, or a list of objects with 'name' and 'template'"
                raise WeightFileError(f"{self.path}: chat_template", item, problem)
            templates[name] = source
        return templates

    def added_tokens(self) -> list[tuple[int, tokenizers.AddedToken]]:
        """`added_tokens_decoder`: tokens that sentencepiece's own file does not hold."""
        value = self.tokenizer.get("added_tokens_decoder", {})
        found: list[tuple[int, tokenizers.AddedToken]] = []
        for key, item in value.items() if isinstance(value, dict) else ():
            content = item.get("content") if isinstance(item, dict) else None
            if not key.isdecimal() or len(key) > 9 or not isinstance(content, str) or not content:
                field = f"{self.path}: added_tokens_decoder"
                raise WeightFileError(field, {key: item}, "must map token ids to objects with 'content'")
            special = item.get("special") is True
            found.append((int(key), tokenizers.AddedToken(content, special=special, normalized=False)))
        return sorted(found, key=lambda entry: entry[0])


def _special_tokens(
    config: _Config, vocabulary: Vocabulary, names: Mapping[str, str], prefix: tuple[int, ...], suffix: tuple[int, ...]
) -> SpecialTokens:
    """Roles and ids. `prefix` and `suffix` hold where the configuration does not say otherwise."""
    ids = {role: vocabulary.id_of(name) for role, name in names.items()}
    bos, eos = ids.get("bos_token"), ids.get("eos_token")
    for flag, token_id, role in (("add_bos_token", bos, "bos_token"), ("add_eos_token", eos, "eos_token")):
        if config.flag(flag) and token_id is None:
            raise WeightFileError(f"{config.path}: {flag}", True, f"needs a {role} that is in the vocabulary")
    if (adds := config.flag("add_bos_token")) is not None:
        prefix = (bos,) if adds and bos is not None else ()
    if (adds := config.flag("add_eos_token")) is not None:
        suffix = (eos,) if adds and eos is not None else ()
    declared = [*config.end_ids(vocabulary.size), *([eos] if eos is not None else [])]
    return SpecialTokens(
        bos_token_id=bos,
        eos_token_ids=end_token_ids(vocabulary, declared),
        pad_token_id=ids.get("pad_token"),
        names=names,
        prefix=prefix,
        suffix=suffix,
    )


def _vocabulary(
    path: Path, texts: Sequence[str], kinds: Sequence[int], spelling: Spelling, rows: int | None
) -> Vocabulary:
    """The tokens, and unused ones for the rows behind them."""
    missing = 0 if rows is None else rows - len(texts)
    if missing < 0:
        problem = f"must have at most {rows} tokens, as the model's embedding has rows; fetch the model again"
        raise UnsupportedModelError(f"{path}: vocabulary", len(texts), problem)
    padding = [f"[PAD{i}]" for i in range(len(texts), len(texts) + missing)]
    all_kinds = np.asarray([*kinds, *[TokenKind.UNUSED] * missing], np.uint8)
    return Vocabulary([*texts, *padding], all_kinds, spelling)


def _from_json(path: Path, config: _Config, rows: int | None) -> Tokenizer:
    """A tokenizer of the `tokenizers` library."""
    try:
        core = tokenizers.Tokenizer.from_str(_read_text(path))
    except WeightFileError:
        raise
    except Exception as error:  # the library raises bare exceptions
        raise WeightFileError(str(path), str(error), "must be a file of the tokenizers library") from error
    core.no_truncation()  # a file may carry the settings of a training run
    core.no_padding()
    spelling, strips_leading_space = _decoder(path, core)
    added = sorted(core.get_added_tokens_decoder().items())
    by_text = core.get_vocab(with_added_tokens=True)
    size = max(by_text.values(), default=-1) + 1
    if not 0 < size <= _MAX_VOCABULARY:
        raise WeightFileError(f"{path}: vocab", size, f"token ids must be in [0, {_MAX_VOCABULARY - 1}]")
    texts = [f"[EMPTY_{i}]" for i in range(size)]  # ids may have gaps
    for text, i in by_text.items():
        texts[i] = text
    bytes_are_spelled = spelling is Spelling.METASPACE
    kinds: list[int] = [TokenKind.BYTE if bytes_are_spelled and is_byte_text(t) else TokenKind.NORMAL for t in texts]
    for i, token in added:
        kinds[i] = TokenKind.CONTROL if token.special else TokenKind.USER_DEFINED
    vocabulary = _vocabulary(path, texts, kinds, spelling, rows)
    prefix, suffix = _surroundings(core)
    return Tokenizer(
        vocabulary,
        TokenizersEncoder(core, added),
        _special_tokens(config, vocabulary, config.names(), prefix, suffix),
        chat_templates=config.chat_templates(),
        strips_leading_space=strips_leading_space,
    )


def _decoder(path: Path, core: tokenizers.Tokenizer) -> tuple[Spelling, bool]:
    """How the file's decoder spells bytes, and whether it takes a leading space away."""
    state: dict[str, Any] = {"type": "none"} if core.decoder is None else json.loads(core.decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return Spelling.BYTE_LEVEL, False
    if kinds == {"Metaspace"}:
        return Spelling.METASPACE, steps[0].get("prepend_scheme", "always") != "never"
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"} and "Replace" in kinds:
        return Spelling.METASPACE, any(step["type"] == "Strip" and step["start"] > 0 for step in steps)
    known = "ByteLevel, Metaspace, or Replace with ByteFallback, Fuse and Strip"
    raise UnsupportedModelError(f"{path}: decoder", ", ".join(sorted(kinds)), f"must be {known}")


def _surroundings(core: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the file's post-processor puts before and after a text, found by trying."""
    bare = core.encode("a", add_special_tokens=False).ids
    full = core.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


def _from_sentencepiece(path: Path, config: _Config, rows: int | None) -> Tokenizer:
    """A sentencepiece model, with the tokens that `tokenizer_config.json` adds to it."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(_read_bytes(path))
    except RuntimeError as error:
        raise WeightFileError(str(path), str(error), "must be a sentencepiece model") from error
    size = processor.vocab_size()
    texts = [processor.id_to_piece(i) for i in range(size)]
    kinds = [_piece_kind(processor, i) for i in range(size)]
    control = {texts[i]: i for i in range(size) if kinds[i] in SPECIAL_KINDS}
    always: dict[str, int] = {}
    for i, token in config.added_tokens():
        if i < size:
            continue  # repeats a piece of the model
        if i != len(texts):
            field = f"{config.path}: added_tokens_decoder"
            raise WeightFileError(field, i, f"added ids must go on where the model ends, with {len(texts)}")
        texts.append(token.content)
        kinds.append(TokenKind.CONTROL if token.special else TokenKind.USER_DEFINED)
        (control if token.special else always)[token.content] = i
    vocabulary = _vocabulary(path, texts, kinds, Spelling.METASPACE, rows)
    roles = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "pad_token": processor.pad_id()}
    names = {role: texts[i] for role, i in roles.items() if i >= 0} | config.names()
    bos = vocabulary.id_of(names["bos_token"]) if "bos_token" in names else None
    return Tokenizer(
        vocabulary,
        SentencePieceEncoder(processor, always=always, control=control),
        # transformers' sentencepiece tokenizers add BOS and no EOS unless told otherwise
        _special_tokens(config, vocabulary, names, () if bos is None else (bos,), ()),
        chat_templates=config.chat_templates(),
        strips_leading_space=processor.normalize("a").startswith("▁"),
    )


def _piece_kind(processor: sentencepiece.SentencePieceProcessor, i: int) -> TokenKind:
    """The kind of a piece; sentencepiece itself matches user-defined ones, so they count as normal here."""
    if processor.is_unknown(i):
        return TokenKind.UNKNOWN
    if processor.is_control(i):
        return TokenKind.CONTROL
    if processor.is_byte(i):
        return TokenKind.BYTE
    return TokenKind.UNUSED if processor.is_unused(i) else TokenKind.NORMAL
