"""Text comes as soon as no stop string can begin in it, and never anything behind a stop string."""

import string

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from atoma_jax import SamplingParams
from atoma_jax.engine.text_stream import TextStream
from atoma_jax.tokenizer import Tokenizer


class Pieces(Tokenizer):
    """Its tokens are the given byte strings; the first one is special."""

    def __init__(self, pieces: list[bytes]):
        self.pieces, self.strips_leading_space = pieces, False

    def text_bytes(self, ids: list[int], *, skip_special_tokens: bool) -> bytes:
        return b"".join(self.pieces[i] for i in ids if i or not skip_special_tokens)


def stream_of(pieces: list[bytes], **settings) -> TextStream:
    return TextStream(Pieces([b"<end>", *pieces]), SamplingParams(**settings))


def whole_text(pieces: list[str], stops: list[str], keep: bool, min_tokens: int) -> tuple[str, str | None, int]:
    """Text, stop string and tokens used, seen from the end: the stop string that ends first, of those that end in the
    same place the longest."""
    text = ""
    for index, piece in enumerate(pieces):
        before, text = len(text), text + piece
        if index < min_tokens:
            continue
        for end in range(before + 1, len(text) + 1):
            ending = [stop for stop in stops if text[:end].endswith(stop)]
            if ending:
                stop = max(ending, key=len)
                return text[: end if keep else end - len(stop)], stop, index + 1
    return text, None, len(pieces)


few = st.text("ab€", min_size=1, max_size=4)


@given(st.lists(few | st.just(""), max_size=20), st.lists(few, max_size=4), st.booleans(), st.integers(0, 5))
@example(["a", "b", "x"], ["abc", "b"], False, 2)  # the "b" that is held for "abc" came before min_tokens
@example(["ab"], ["ab", "b"], False, 0)
@example(["a", "a", "b"], ["aab", "ab"], True, 0)
def test_it_is_what_the_whole_text_gives(pieces: list[str], stops: list[str], keep: bool, min_tokens: int) -> None:
    stream = stream_of(
        [piece.encode() for piece in pieces],
        stop=stops,
        include_stop_str_in_output=keep,
        min_tokens=min_tokens,
        max_tokens=100,
    )
    wanted, wanted_stop, used = whole_text(pieces, stops, keep, min_tokens)
    stop, taken, count = None, "", 0
    for token in range(1, len(pieces) + 1):
        stop = stream.push(token, ends=False)
        count += 1
        taken += stream.take()
        assert taken == stream.text
        assert wanted.startswith(taken), "something was shown that is not part of the answer"
        if stop is not None:
            break
        so_far = "".join(pieces[:count])
        held = so_far[len(taken) :]
        assert any(stop.startswith(held) for stop in stops) or not held, "text was held back for nothing"
    stream.finish()
    taken += stream.take()
    assert (taken, stop, count) == (wanted, wanted_stop, used)
    assert stream.take() == ""
    stream.finish()
    assert stream.text == wanted


@given(st.lists(st.binary(max_size=3), max_size=10))
def test_bytes_become_text_as_a_whole_whatever_cuts_them(pieces: list[bytes]) -> None:
    stream = stream_of(pieces)
    for token in range(1, len(pieces) + 1):
        stream.push(token, ends=False)
    stream.finish()
    assert stream.text == b"".join(pieces).decode(errors="replace")


def test_a_character_split_over_tokens_comes_once_it_is_whole() -> None:
    stream = stream_of([b"\xf0\x9f", b"\x98", b"\x80!"])
    shown = [stream.push(token, ends=False) or stream.take() for token in (1, 2, 3)]
    assert shown == ["", "", "😀!"]


def test_a_broken_character_behind_a_stop_string_is_not_shown() -> None:
    stream = stream_of([b"yes.\xf0\x9f"], stop=".")
    assert stream.push(1, ends=False) == "."
    stream.finish()  # as an abort of another sample of the request does
    assert stream.text == "yes"


def test_the_text_of_an_end_token_is_shown_only_where_stops_are_kept() -> None:
    assert ended_by(stop_token_ids=[2]) == "ab"
    assert ended_by(stop_token_ids=[2], include_stop_str_in_output=True) == "abcd"


def ended_by(**settings) -> str:
    stream = stream_of([b"ab", b"cd"], **settings)
    assert stream.push(1, ends=False) is None
    assert stream.push(2, ends=True) is None
    stream.finish()
    return stream.text


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "<end>ab")])
def test_special_tokens_are_left_out_unless_wanted(skip: bool, text: str) -> None:
    stream = stream_of([b"ab"], skip_special_tokens=skip)
    stream.push(0, ends=False)
    stream.push(1, ends=False)
    assert stream.text == text


def test_the_work_of_a_token_does_not_grow_with_the_text() -> None:
    """All that a push looks at is what is held: shorter than a stop string and one token."""
    stream = stream_of([c.encode() for c in string.printable], stop=["xyY", "the end"])
    for index in range(20_000):
        stream.push(1 + index % len(string.printable), ends=False)
        assert len(stream._held) < len("the end")
    assert len(stream.text) >= 19_990
