"""A stream of tokens decodes to the text of the whole, in valid pieces, wherever it is cut."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoma_jax.errors import UserError
from atoma_jax.tokenizer import IncrementalDecoder, Tokenizer
from atoma_jax.tokenizer.vocabulary import Vocabulary

KINDS = ["byte_level", "spm"]


@pytest.fixture(params=KINDS, scope="session")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param).ours


def stream(tokenizer: Tokenizer, ids: list[int], step: int, *, skip: bool, continues: bool) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip, continues=continues)
    return [*(decoder.push(ids[i : i + step]) for i in range(0, len(ids), step)), decoder.flush()]


@settings(max_examples=60)
@given(data=st.data(), step=st.integers(1, 5), skip=st.booleans(), continues=st.booleans())
def test_any_ids_cut_anywhere_decode_as_the_whole(
    tokenizer: Tokenizer, data: st.DataObject, step: int, skip: bool, continues: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    pieces = stream(tokenizer, ids, step, skip=skip, continues=continues)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip, continues=continues)
    for piece in pieces:
        piece.encode()  # valid Unicode by itself


@settings(max_examples=60)
@given(text=st.text(max_size=60))
def test_no_piece_holds_a_replacement_character_that_the_text_does_not(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "").replace("▁", " ")
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, ids, 1, skip=True, continues=False)
    assert "".join(pieces) == text


def test_an_emoji_split_over_tokens_comes_out_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    assert len(ids) >= 4
    pieces = stream(tokenizer, ids, 1, skip=True, continues=False)
    assert [piece for piece in pieces if piece] == ["🙂"]


def test_an_answer_that_stops_inside_a_character_ends_with_one_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂", add_special_tokens=False)[:-1]
    pieces = stream(tokenizer, ids, 1, skip=True, continues=False)
    assert pieces[-1] == "\ufffd"
    assert "".join(pieces[:-1]) == ""


def test_a_push_reads_its_own_tokens_only(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a stream takes time linear in its length: counted, not timed."""
    reads: list[int] = []
    token_bytes = Vocabulary.token_bytes

    def counting(vocabulary: Vocabulary, token_id: int) -> bytes:
        reads.append(token_id)
        return token_bytes(vocabulary, token_id)

    monkeypatch.setattr(Vocabulary, "token_bytes", counting)
    ids = [300 + i % 100 for i in range(1000)]
    stream(tokenizer, ids, 1, skip=True, continues=False)
    assert reads == ids


def test_the_space_of_sentencepiece_is_dropped_at_the_beginning_of_a_text_only(spm: Any) -> None:
    ids = spm.ours.encode("the dog", add_special_tokens=False)
    assert spm.ours.decode(ids) == "the dog"
    assert spm.ours.decode(ids, continues=True) == " the dog"


@pytest.mark.parametrize("bad", [-1, 10**9])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, bad: int) -> None:
    with pytest.raises(UserError, match=r"token_ids: a token id must be in \[0, \d+\], got"):
        tokenizer.decode([0, bad])
    with pytest.raises(UserError, match="token_ids"):
        IncrementalDecoder(tokenizer).push([bad])
    with pytest.raises(UserError, match="token_ids"):
        tokenizer.token_bytes(bad)
    with pytest.raises(UserError, match="token_ids"):
        tokenizer.id_to_token(bad)
