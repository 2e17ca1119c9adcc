"""What one rendering of a chat template may use: steps, processor time, text made on the way, text handed out.

Owns the accounting, in numbers that do not depend on the machine except for processor time. What is accounted for is
decided in `template_sandbox.py`.
"""

import time
from collections.abc import ItemsView, Iterable, KeysView, ValuesView
from dataclasses import dataclass
from itertools import chain
from typing import Any

from jinja2 import Undefined

from atoma_jax.errors import TemplateError

_STRING_OVERHEAD = 20  # in characters: what an empty string object takes
_CONTAINER_OVERHEAD = 48
_STEPS_A_CLOCK_READING = 64
_CHARACTERS_A_STEP = 256  # work inside one C call that counts as a step
_ITEMS_A_STEP = 16  # measured items that count as a step
MAX_INTEGER_BITS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateLimits:
    """Limits of one rendering. The defaults end a hostile template within about a second and 64 MB.

    Attributes:
        seconds: processor time of the rendering thread, so that a busy machine does not fail an honest template.
        steps: loop rounds, calls, operators and filters; an honest template takes some tens a message.
        output_characters: length of the rendered text.
    """

    seconds: float = 1.0
    steps: int = 500_000
    output_characters: int = 1_000_000

    @property
    def working_characters(self) -> int:
        """All text made on the way, summed, at up to four bytes a character."""
        return 16 * self.output_characters

    @property
    def value_characters(self) -> int:
        """Any one value written out as text, which bounds the time of any one operation on it."""
        return 4 * self.output_characters


class Budget:
    """What is left of the limits of one rendering. Every method raises `TemplateError` when a limit is passed."""

    def __init__(self, limits: TemplateLimits):
        self._limits = limits
        self._steps = 0
        self._working = 0
        self._next_clock = _STEPS_A_CLOCK_READING
        self._deadline = time.thread_time() + limits.seconds
        self._written: dict[int, tuple[object, int]] = {}  # by id; keeps the objects alive so that ids stay theirs

    def step(self, cost: int = 1) -> None:
        """Counts one step of the template, or a long one as several."""
        self._steps += cost
        if self._steps > self._limits.steps:
            raise self._exceeded("steps", self._limits.steps)
        if self._steps >= self._next_clock:
            self._next_clock = self._steps + _STEPS_A_CLOCK_READING
            if time.thread_time() > self._deadline:
                raise self._exceeded("seconds of processor time", self._limits.seconds)

    def make(self, characters: int) -> None:
        """Counts text, or memory measured in characters, that the template is about to make."""
        self._working += characters
        if self._working > self._limits.working_characters:
            raise self._exceeded("characters of working memory", self._limits.working_characters)
        self.step(1 + characters // _CHARACTERS_A_STEP)

    def make_value(self, value: Any) -> None:
        """Counts a value that was just made: a string whole, a container without what it refers to."""
        if isinstance(value, str):
            self.make(len(value) + _STRING_OVERHEAD)
        elif isinstance(value, dict):
            self.make(_CONTAINER_OVERHEAD + 24 * len(value))
            self.written(value)
        elif isinstance(value, (list, tuple)):
            self.make(_CONTAINER_OVERHEAD + 2 * len(value))
            self.written(value)
        elif isinstance(value, int):
            self.check_integer(value)

    def make_strings(self, strings: list[str] | tuple[str, ...]) -> None:
        """Counts a container of new strings."""
        self.make(_CONTAINER_OVERHEAD + sum(len(s) + _STRING_OVERHEAD for s in strings))

    def check_value(self, characters: int) -> None:
        """Refuses a value that would be too long, before it is made."""
        if characters > self._limits.value_characters:
            raise self._exceeded("characters in one value", self._limits.value_characters)

    def check_integer(self, value: int) -> None:
        """Refuses integers on which a single operation takes long."""
        if value.bit_length() > MAX_INTEGER_BITS:
            raise self._exceeded("bits in an integer", MAX_INTEGER_BITS)

    def output(self, total_characters: int) -> None:
        """Checks the length of the text handed out so far."""
        if total_characters > self._limits.output_characters:
            raise self._exceeded("characters of output", self._limits.output_characters)

    def written(self, value: Any) -> int:
        """About how many characters a value has as text, counting what is shared as often as it would be written.

        Lists may share their elements, so that forty nested pairs are a terabyte as text and hours to compare.
        """
        if isinstance(value, str):
            return len(value) + _STRING_OVERHEAD
        if isinstance(value, (list, tuple, dict)):
            known = self._written.get(id(value))
            if known is None:
                known = value, self._written_items(chain(value, value.values()) if isinstance(value, dict) else value)
                self._written[id(value)] = known
            return known[1]
        if isinstance(value, ItemsView):
            return self._written_items(chain.from_iterable(value))
        if isinstance(value, (KeysView, ValuesView)):
            return self._written_items(value)
        if value is None or isinstance(value, (bool, float, Undefined)):
            return 24
        if isinstance(value, int):
            self.check_integer(value)
            return 8 + value.bit_length() // 3
        raise TemplateError("chat_template", type(value).__name__, "only plain data can be printed, compared or nested")

    def _written_items(self, items: Iterable[Any]) -> int:
        """The sum over the items of a container."""
        total = _CONTAINER_OVERHEAD
        for count, item in enumerate(items):
            total += len(item) + _STRING_OVERHEAD if type(item) is str else self.written(item)
            if count % _ITEMS_A_STEP == 0:
                self.check_value(total)
                self.step()
        self.check_value(total)
        return total

    def _exceeded(self, what: str, limit: int | float) -> TemplateError:
        return TemplateError("chat_template", f"more than {limit}", f"rendering takes too many {what}")
