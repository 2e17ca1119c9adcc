"""A tokenizer built from GGUF metadata equals the library that trained it, and damaged metadata is refused by name."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoma_jax.errors import ParameterError, UnsupportedModelError, WeightFileError
from atoma_jax.tokenizer import load_gguf_tokenizer
from atoma_jax.tokenizer.tokenizer import check_text

SENTENCES = [
    "It's 12:45 now; we'll see.",
    "Grüße aus Köln — ",
    "Привет, 日本語 aaa  two",
    "def add(a, b):\n    return a",
]

TEXTS = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(SENTENCES), max_size=3).map("".join))


@settings(max_examples=100)
@given(text=TEXTS)
def test_byte_level_ids_equal_the_library_and_decode_to_the_text(byte_level: Any, text: str) -> None:
    ids = byte_level.ours.encode(text, add_special_tokens=False)
    assert ids == byte_level.library.encode(text, add_special_tokens=False).ids
    assert byte_level.ours.decode(ids) == text
    assert b"".join(map(byte_level.ours.token_bytes, ids)) == text.encode()


@settings(max_examples=100)
@given(text=TEXTS)
def test_sentencepiece_ids_equal_the_library_and_decode_to_the_text(spm: Any, text: str) -> None:
    ids = spm.ours.encode(text, add_special_tokens=False)
    assert ids == spm.library.encode(text)
    assert spm.ours.decode(ids) == text.replace("▁", " ")


def test_control_tokens_are_parsed_from_rendered_templates_only(byte_level: Any) -> None:
    text = "a<|im_end|>b"
    plain = byte_level.ours.encode(text, add_special_tokens=False)
    parsed = byte_level.ours.encode(text, add_special_tokens=False, parse_special=True)
    assert 2 not in plain
    assert byte_level.ours.decode(plain) == text
    assert parsed.count(2) == 1
    assert byte_level.ours.decode(parsed) == "ab"
    assert byte_level.ours.decode(parsed, skip_special_tokens=False) == text


def test_user_defined_tokens_are_matched_in_every_text(byte_level: Any) -> None:
    think = byte_level.ours.token_to_id("<think>")
    assert think is not None
    assert think in byte_level.ours.encode("x<think>y", add_special_tokens=False)
    assert byte_level.ours.decode([think]) == "<think>"  # a part of the answer's text, unlike a control token


def test_sentencepiece_parses_control_tokens_on_request(spm: Any) -> None:
    assert spm.ours.encode("</s>", parse_special=True) == [1, 2]
    assert 2 not in spm.ours.encode("</s>")


def test_a_space_goes_before_the_text_after_each_control_token(spm: Any) -> None:
    word = spm.ours.encode("the", add_special_tokens=False)
    assert spm.ours.encode("</s>the", add_special_tokens=False, parse_special=True) == [2, *word]


def test_bos_and_eos_follow_the_file(byte_level: Any, spm: Any) -> None:
    assert byte_level.ours.encode("") == []  # gpt-2 asks for no BOS
    assert spm.ours.encode("") == [1]  # a missing add_bos_token means true for sentencepiece
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert load_gguf_tokenizer({**byte_level.metadata, **flags}).encode("") == [0, 1]
    assert load_gguf_tokenizer({**spm.metadata, "tokenizer.ggml.add_bos_token": False}).encode("") == []


def test_no_space_is_added_where_the_file_says_so(spm: Any) -> None:
    ours = load_gguf_tokenizer({**spm.metadata, "tokenizer.ggml.add_space_prefix": False})
    assert ours.decode(ours.encode(" the")) == " the"
    assert ours.encode(" the")[1:] == spm.ours.encode("the")[1:]


def test_end_tokens_are_the_declared_ones_and_control_tokens_known_by_name(byte_level: Any) -> None:
    assert byte_level.ours.eos_token_ids == {1, 2}  # declared <|eos|>, and <|im_end|>
    declared = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}
    assert load_gguf_tokenizer({**byte_level.metadata, **declared}).eos_token_ids == {1, 2, 5, 6}
    as_text = np.array([1 if i == 2 else kind for i, kind in enumerate(byte_level.metadata[KINDS])], np.int32)
    assert load_gguf_tokenizer({**byte_level.metadata, KINDS: as_text}).eos_token_ids == {1}


def test_end_of_message_is_no_end_of_answer_in_harmony(byte_level: Any) -> None:
    renamed = dict(zip(byte_level.metadata[TOKENS][:3], ["<|end|>", "<|return|>", "<|call|>"], strict=True))
    texts = [renamed.get(text, text) for text in byte_level.metadata[TOKENS]]
    assert load_gguf_tokenizer({**byte_level.metadata, TOKENS: texts}).eos_token_ids == {1, 2}


def test_numeric_arrays_may_be_numpy_arrays(spm: Any) -> None:
    arrays = {SCORES: np.array(spm.metadata[SCORES], np.float32), KINDS: np.array(spm.metadata[KINDS], np.int32)}
    assert load_gguf_tokenizer({**spm.metadata, **arrays}).encode("the dog") == spm.ours.encode("the dog")


TOKENS, SCORES, KINDS = "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"
DAMAGE: list[tuple[str, Any]] = [
    (TOKENS, None),
    (TOKENS, []),
    (TOKENS, ["a", "a"]),
    (TOKENS, ["a", 1]),
    (KINDS, [1, 1]),
    (KINDS, [6] * 1000),
    (KINDS, "normal"),
    ("tokenizer.ggml.bos_token_id", 10**6),
    ("tokenizer.ggml.bos_token_id", -1),
    ("tokenizer.ggml.add_bos_token", "yes"),
    ("tokenizer.chat_template", 5),
]


@pytest.mark.parametrize("kind", ["byte_level", "spm"])
@pytest.mark.parametrize(("key", "value"), DAMAGE)
def test_damaged_metadata_is_refused_by_key(kind: str, key: str, value: Any, request: pytest.FixtureRequest) -> None:
    metadata = {**request.getfixturevalue(kind).metadata, key: value}
    with pytest.raises(WeightFileError, match=f"model.gguf: {key}"):
        load_gguf_tokenizer(metadata, source="model.gguf")


@pytest.mark.parametrize("merges", [["ab"], ["a  b"], ["a nowhere"], [" a"]])
def test_damaged_merges_are_refused(byte_level: Any, merges: list[str]) -> None:
    with pytest.raises(WeightFileError, match=r"tokenizer\.ggml\.merges"):
        load_gguf_tokenizer({**byte_level.metadata, "tokenizer.ggml.merges": merges})


def test_too_few_scores_are_refused(spm: Any) -> None:
    with pytest.raises(
        WeightFileError, match=r"tokenizer\.ggml\.scores: must have a value for each of 420 tokens, got 2"
    ):
        load_gguf_tokenizer({**spm.metadata, SCORES: [0.0, 0.0]})


def test_bos_that_is_asked_for_and_missing_is_refused(byte_level: Any) -> None:
    metadata = {k: v for k, v in byte_level.metadata.items() if k != "tokenizer.ggml.bos_token_id"}
    with pytest.raises(WeightFileError, match=r"needs tokenizer\.ggml\.bos_token_id"):
        load_gguf_tokenizer({**metadata, "tokenizer.ggml.add_bos_token": True})


def test_unknown_tokenizers_are_refused_with_what_is_known(byte_level: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.ggml\.model: must be gpt2 .* or llama .*, got 'rwkv'"):
        load_gguf_tokenizer({**byte_level.metadata, "tokenizer.ggml.model": "rwkv"})
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.ggml\.pre: .*llama-bpe.*smollm.*, got 'never-heard'"):
        load_gguf_tokenizer({**byte_level.metadata, "tokenizer.ggml.pre": "never-heard"})


@pytest.mark.parametrize("kind", ["byte_level", "spm"])
def test_lone_surrogates_are_refused_and_nul_is_not(kind: str, request: pytest.FixtureRequest) -> None:
    ours = request.getfixturevalue(kind).ours
    with pytest.raises(ParameterError, match=r"prompt holds a lone surrogate, U\+D83D at character 2"):
        ours.encode("ab\ud83d")
    assert ours.decode(ours.encode("a\0b", add_special_tokens=False)) == "a\0b"


def test_a_prompt_that_is_no_string_is_refused() -> None:
    with pytest.raises(ParameterError, match="prompt must be a string, got int"):
        check_text("prompt", 5)
