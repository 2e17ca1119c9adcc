"""Lists of layers in a quantization config: names, and regular expressions behind "re:".

A config comes with a model from anywhere, and Python's engine backtracks. So expressions are refused that can take
exponential time (a repeated group), and the power of the rest is limited.
"""

import re
from dataclasses import dataclass

from atoma_jax.errors import UnsupportedModelError, WeightFileError

_MAX_LENGTH = 512  # characters of an expression
_MAX_PATTERNS = 256  # expressions of one list
_MAX_REPEATS = 4  # of unbounded length in one expression: "re:.*self_attn.*" has two
_MAX_NAME = 192  # characters of a name that expressions are tried on
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_REPEAT = re.compile(r"(?<!\\)[*+]|\{\d*,")


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

    def matches(self, name: str) -> bool:
        """Whether an expression fits the beginning of a name."""
        if self.patterns and len(name) > _MAX_NAME:
            raise WeightFileError(
                "tensor name", name, f"must have at most {_MAX_NAME} characters to try patterns on it"
            )
        return any(pattern.match(name) for pattern in self.patterns)


def _compiled(field: str, source: str) -> re.Pattern[str]:
    repeats = len(_REPEAT.findall(source))
    if len(source) > _MAX_LENGTH or repeats > _MAX_REPEATS or _REPEATED_GROUP.search(source):
        problem = f"an expression may have {_MAX_LENGTH} characters and {_MAX_REPEATS} repeats, none of them of a group"
        raise UnsupportedModelError(field, f"re:{source}", problem)
    try:
        return re.compile(source)
    except (re.error, RecursionError, OverflowError) as error:
        raise WeightFileError(field, f"re:{source}", f"must be a regular expression ({error})") from error
