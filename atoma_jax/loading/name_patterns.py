"""Lists of layers in a quantization config: names, and regular expressions behind "re:".

A config comes with a model from anywhere, and Python's engine backtracks. So a repeated group is refused, which can
take exponential time, and the number of choices in the rest is limited.
"""

import re
from dataclasses import dataclass

from atoma_jax.errors import UnsupportedModelError, WeightFileError

_MAX_LENGTH = 512  # characters of an expression
_MAX_PATTERNS = 256  # expressions of one list
_MAX_REPEATS = 3  # and options in one expression: "re:.*self_attn.*" has two
_MAX_ALTERNATIVES = 8  # further ones in one expression: "re:.*(q|k|v)_proj" has two
_MAX_NAME = 192  # characters of a name that expressions are tried on
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_REPEAT = re.compile(r"(?<!\\)[*+]|(?<![\\(*+])\?|\{\d*,")  # "(?" opens a group, "*?" is one repeat
_INLINE_FLAGS = re.compile(r"\(\?[a-zA-Z-]+[:)]")  # "(?x)" lets a blank stand before a repeat
_AMBIGUOUS_SET = re.compile(r"\[\^?\[|--|&&|\|\||~~")  # what future versions of Python may read otherwise


@dataclass(frozen=True, slots=True)
class NamePatterns:
    """Some of a model's modules."""

    names: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, field: str, entries: tuple[str, ...]) -> "NamePatterns":
        """From a list of a config, called `field` in errors.

        Raises:
            WeightFileError: an expression is invalid.
            UnsupportedModelError: one may take too long, or there are too many.
        """
        sources = [entry.removeprefix("re:") for entry in entries if entry.startswith("re:")]
        if len(sources) > _MAX_PATTERNS:
            raise UnsupportedModelError(field, len(sources), f"may have at most {_MAX_PATTERNS} expressions")
        names = frozenset(entry for entry in entries if not entry.startswith("re:"))
        return cls(names, tuple(_compiled(field, source) for source in sources))

    def matches(self, name: str, field: str) -> bool:
        """Whether an expression fits the beginning of a module's name; `field` is its tensor, for errors."""
        if self.patterns and len(name) > _MAX_NAME:
            problem = f"must have at most {_MAX_NAME} characters to try expressions on it"
            raise WeightFileError(f"{field} name", name, problem)
        return any(pattern.match(name) for pattern in self.patterns)


def _compiled(field: str, source: str) -> re.Pattern[str]:
    repeats = len(_REPEAT.findall(source))
    powerful = repeats > _MAX_REPEATS or source.count("|") > _MAX_ALTERNATIVES or _REPEATED_GROUP.search(source)
    if len(source) > _MAX_LENGTH or powerful:
        problem = f"an expression may have {_MAX_LENGTH} characters, {_MAX_REPEATS} repeats, none of them of a group"
        raise UnsupportedModelError(field, f"re:{source}", f"{problem}, and {_MAX_ALTERNATIVES} alternatives")
    if _INLINE_FLAGS.search(source):
        raise UnsupportedModelError(field, f"re:{source}", "flags inside of expressions are not implemented")
    if _AMBIGUOUS_SET.search(source):
        raise UnsupportedModelError(field, f"re:{source}", "sets of sets in expressions are not implemented")
    try:
        return re.compile(source)
    except (re.error, RecursionError, OverflowError) as error:
        raise WeightFileError(field, f"re:{source}", f"must be a regular expression ({error})") from error
