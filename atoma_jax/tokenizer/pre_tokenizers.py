"""How byte-level BPE models split a text into words before they merge: the values of GGUF's `tokenizer.ggml.pre`.

Patterns are those of the models' own `tokenizer.json`; the names, and which models share one, are those of llama.cpp's
`src/llama-vocab.cpp`. A wrong pattern gives wrong ids silently, so an unknown name is refused, never guessed.
"""

from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

from atoma_jax.errors import UnsupportedModelError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LOWER_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SLASH_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_LOWER_WORD}|{_UPPER_WORD}|\p{{N}}{_SLASH_TAIL}"
_GPT4O = rf"{_LOWER_WORD}{_CONTRACTIONS}?|{_UPPER_WORD}{_CONTRACTIONS}?|\p{{N}}{{1,3}}{_SLASH_TAIL}"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
# llama.cpp's pattern for files that predate the key; it splits as no model's own tokenizer does, but as every
# llama.cpp user of such a file gets it.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True, slots=True)
class PreTokenization:
    """How one family of models prepares a text.

    Attributes:
        patterns: applied one after the other, each to the pieces the one before left.
        ignore_merges: a word that is a token is taken whole, whatever the merges say.
        add_bos: whether BOS is put before a prompt if the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> PreTokenizer:
        """The pre-tokenizer, ending in GPT-2's byte alphabet."""
        splits: list[PreTokenizer] = [Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


_FAMILIES: dict[tuple[str, ...], PreTokenization] = {
    ("default",): PreTokenization(_DEFAULT),
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion"): PreTokenization(
        (_GPT2,)
    ),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): PreTokenization(
        (r"\p{N}", _GPT2)
    ),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"): PreTokenization(
        (_LLAMA3,), ignore_merges=True, add_bos=True
    ),
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): PreTokenization((_LLAMA3,)),
    ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"): PreTokenization((_QWEN2,)),
    ("qwen35",): PreTokenization((_QWEN35,)),
    ("tekken",): PreTokenization((_TEKKEN,), ignore_merges=True, add_bos=True),
    ("gpt-4o", "llama4"): PreTokenization((_GPT4O,)),
    ("deepseek-v3", "hunyuan-dense"): PreTokenization(_DEEPSEEK_V3),
    ("deepseek-coder",): PreTokenization(_DEEPSEEK_CODER),
}
PRE_TOKENIZATIONS: dict[str, PreTokenization] = {name: p for names, p in _FAMILIES.items() for name in names}


def pre_tokenization(field: str, name: str) -> PreTokenization:
    """The pre-tokenization called `name`.

    Raises:
        UnsupportedModelError: `field` holds a name that is not known here.
    """
    found = PRE_TOKENIZATIONS.get(name)
    if found is None:
        raise UnsupportedModelError(field, name, f"must be one of {', '.join(sorted(PRE_TOKENIZATIONS))}")
    return found
