"""Finds the tool calls in a model's text as it comes: what is content, which function, its arguments piece by piece.

Owns the two styles in which models write calls, and reading them in one pass: time is linear in the text whatever a
model writes, and the same pieces come out however the text is cut. Text that looks like a call and is none is content.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

_LONGEST_HEAD = 4096  # characters up to the arguments, for arguments that are passed on as they come
_LONGEST_WHOLE = 1 << 16  # characters of a call whose arguments are not
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_BREAKS = re.compile(r'["{}\[\]]')  # outside a string
_ENDS = re.compile(r'["\\]')  # inside one
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """How a family of models writes a call: an object with `name` and `key`, between `opens` and `closes`."""

    name: str
    key: Literal["arguments", "parameters"]
    opens: str  # empty: an answer that begins with an object is a call
    closes: str
    between: str  # calls


STYLES = {
    "hermes": ToolStyle("hermes", "arguments", "<tool_call>", "</tool_call>", "\n"),  # Hermes, Qwen
    "llama3_json": ToolStyle("llama3_json", "parameters", "", "", "; "),  # Llama 3.1 and later
}
PYTHON_TAG = "<|python_tag|>"  # before a call of Llama 3, where special tokens are shown


class Piece(NamedTuple):
    """News of an answer: more content, a call that begins (its function's name), or more of its arguments."""

    kind: Literal["content", "call", "arguments"]
    text: str
    number: int = 0  # of the call


class ToolCallParser:
    """Reads one answer. The arguments of calls are passed on as the model writes them, valid JSON or not."""

    def __init__(self, style: ToolStyle, *, limit: int | None = None):
        """`limit`: calls after as many are left out."""
        self.num_calls = 0
        self._style, self._limit = style, limit
        self._text = ""  # not read yet, or perhaps no call after all
        self._at = 0  # of it is read
        self._mark = 0  # where what may be content after all begins
        self._scan = _Scanner()
        self._leading: list[str] = []  # white space before anything else
        self._news: list[Piece] = []
        self._state = self._content if style.opens else self._start

    def push(self, text: str) -> list[Piece]:
        """Takes text; returns what has become certain, neighbours of a kind joined."""
        self._text += text
        while self._state():
            pass
        keep = self._mark if self._state in (self._opening, self._object) else self._at
        self._text, self._at, self._mark = self._text[keep:], self._at - keep, self._mark - keep
        self._scan.moved(keep)
        return self._take()

    def finish(self) -> list[Piece]:
        """The answer ends here."""
        if self._state in (self._opening, self._object):
            self._emit("content", "".join(self._leading) + self._text[self._mark :])
        elif self._state in (self._content, self._start) and not self.num_calls:
            self._emit("content", "".join(self._leading) + self._text[self._at :])
        elif self._state == self._content:
            self._emit("content", self._text[self._at :])
        self._text, self._at = "", 0
        return self._take()

    # States: each reads on, and returns whether another one goes on from there.

    def _content(self) -> bool:
        tag, text = self._style.opens, self._text
        if not tag:
            self._emit("content", text[self._at :])
            self._at = len(text)
            return False
        found = text.find(tag, self._at)
        end = found if found >= 0 else len(text) - _overlap(text, tag, self._at)
        piece = text[self._at : end]
        if self._leading is not _NONE:
            if piece.strip():
                piece = "".join(self._leading) + piece
                self._leading = _NONE
            else:
                self._leading.append(piece)
                piece = ""
        self._emit("content", piece)
        self._at = end
        if found >= 0:
            self._mark, self._at = found, found + len(tag)
            self._state = self._opening
        return found >= 0

    def _start(self) -> bool:
        """The beginning of an answer in a style without tags."""
        before = self._at
        self._skip_space()
        self._leading.append(self._text[before : self._at])
        self._mark = self._at
        rest = self._text[self._at : self._at + len(PYTHON_TAG)]
        if not rest or (rest != PYTHON_TAG and PYTHON_TAG.startswith(rest)):
            return False
        if rest == PYTHON_TAG:
            self._at += len(PYTHON_TAG)
        self._state = self._opening
        return True

    def _opening(self) -> bool:
        """Behind what opens a call."""
        self._skip_space()
        limit = self._mark + _LONGEST_WHOLE
        if self._at >= limit:
            self._give_up(limit)
        elif self._at == len(self._text):
            return False
        elif self._text[self._at] == "{":
            self._scan = _Scanner(self._at)
            self._state = self._object
        else:
            self._give_up(self._at)
        return True

    def _object(self) -> bool:
        """The object of a call, until its arguments begin; where they are not where they should be, until its end."""
        head = None
        if self._scan.at - self._at < _LONGEST_HEAD:
            head = _HEAD.match(self._text, self._at, self._at + _LONGEST_HEAD)
        if head is not None:
            self._begin(json_text(head[1]))
            self._scan = _Scanner(head.end(), depth=1)
            self._at = head.end()
            self._state = self._arguments
            return True
        limit = self._at + _LONGEST_WHOLE
        end = self._scan.until(self._text, 0, limit)
        if end is None:
            if len(self._text) > limit:
                self._give_up(limit)
            return len(self._text) > limit
        call = _whole(self._text[self._at : end])
        if call is None:
            self._give_up(end)
            return True
        self._begin(call[0])
        self._emit("arguments", call[1])
        self._at = end
        self._state = self._closing
        return True

    def _arguments(self) -> bool:
        end = self._scan.until(self._text, 1)
        stop = len(self._text) if end is None else end
        self._emit("arguments", self._text[self._at : stop])
        self._at = stop
        self._state = self._arguments if end is None else self._rest
        return end is not None

    def _rest(self) -> bool:
        """Behind the arguments, in the call's object."""
        end = self._scan.until(self._text, 0)
        self._at = len(self._text) if end is None else end
        self._state = self._rest if end is None else self._closing
        return end is not None

    def _closing(self) -> bool:
        """Behind a call's object."""
        tag = self._style.closes or self._style.between.strip()
        return self._expect(tag, self._between, self._between)

    def _between(self) -> bool:
        """Behind a call: another one, or content."""
        self._mark = self._at
        if self._style.opens:
            return self._expect(self._style.opens, self._opening, self._content)
        return self._expect("{", self._opening, self._content, keep=True)

    def _expect(self, tag: str, then: Any, otherwise: Any, *, keep: bool = False) -> bool:
        """Goes to one state behind `tag` (before it: `keep`), to the other where something else stands."""
        self._skip_space()
        rest = self._text[self._at : self._at + len(tag)]
        if rest == tag:
            self._mark = self._at
            self._at += 0 if keep else len(tag)
            self._state = then
        elif tag.startswith(rest):
            return False
        else:
            self._leading = _NONE
            self._state = otherwise
        return True

    def _give_up(self, end: int) -> None:
        """What looked like a call up to `end` is content. In a style without tags, so is all that follows."""
        self._emit("content", "".join(self._leading) + self._text[self._mark : end])
        self._leading = _NONE
        self._at = end
        self._state = self._content

    def _begin(self, name: str) -> None:
        self.num_calls += 1
        self._leading = _NONE
        self._emit("call", name)

    def _skip_space(self) -> None:
        match = _SPACE.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _emit(self, kind: Literal["content", "call", "arguments"], text: str) -> None:
        index = max(self.num_calls - 1, 0)
        hidden = kind != "content" and self._limit is not None and index >= self._limit
        if text and not hidden:
            self._news.append(Piece(kind, text, 0 if kind == "content" else index))

    def _take(self) -> list[Piece]:
        joined: list[Piece] = []
        for piece in self._news:
            if joined and piece.kind != "call" and joined[-1][::2] == piece[::2]:
                joined[-1] = joined[-1]._replace(text=joined[-1].text + piece.text)
            else:
                joined.append(piece)
        self._news = []
        return joined


_NONE: list[str] = []  # no white space is held back any more


class _Scanner:
    """Counts brackets of JSON, and knows strings; every character is looked at once."""

    def __init__(self, at: int = 0, depth: int = 0):
        self.at = at
        self._depth, self._in_string, self._escapes = depth, False, False

    def moved(self, count: int) -> None:
        """The text lost characters at its beginning."""
        self.at -= count

    def until(self, text: str, depth: int, stop: int | None = None) -> int | None:
        """Reads on, up to `stop`, until a bracket closes and leaves `depth` open; the place behind it, or None."""
        stop = len(text) if stop is None else min(stop, len(text))
        if self._escapes and self.at < stop:
            self.at += 1
            self._escapes = False
        while True:
            match = (_ENDS if self._in_string else _BREAKS).search(text, self.at, stop)
            if match is None:
                self.at = stop
                return None
            found = match[0]
            self.at = match.end()
            if found == "\\":
                self._escapes = self.at == stop  # the escaped character is yet to come
                self.at += not self._escapes
            elif found == '"':
                self._in_string = not self._in_string
            elif found in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= depth:
                    return self.at


def json_text(literal: str) -> str:
    """The string that a JSON literal stands for; the literal itself where it is not valid."""
    try:
        return json.loads(literal, strict=False)
    except ValueError:
        return literal[1:-1]


def _whole(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call that is there as a whole; None if it is none."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        return value["name"], arguments
    return value["name"], "{}" if arguments is None else json.dumps(arguments, ensure_ascii=False)


def _overlap(text: str, tag: str, start: int) -> int:
    """Characters at the end of `text` behind `start` that `tag` may begin with."""
    for count in range(min(len(tag) - 1, len(text) - start), 0, -1):
        if tag.startswith(text[len(text) - count :]):
            return count
    return 0
