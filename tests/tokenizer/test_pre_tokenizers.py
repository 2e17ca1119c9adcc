"""Each family of byte-level models cuts a text into words as its own tokenizer does; unknown families are refused."""

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from atoma_jax.tokenizer.pre_tokenizers import PRE_TOKENIZATIONS
from atoma_jax.tokenizer.vocabulary import byte_alphabet

ALPHABET = byte_alphabet()


def words(name: str, text: str) -> list[str]:
    """The words, with bytes read back from the alphabet that merges are spelled in."""
    back = {character: byte for byte, character in ALPHABET.items()}
    pieces = PRE_TOKENIZATIONS[name].build().pre_tokenize_str(text)
    return [bytes(back[c] for c in piece).decode(errors="replace") for piece, _ in pieces]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gpt-2", "I'VE don't  x 123½", ["I", "'", "VE", " don", "'t", " ", " x", " 123½"]),
        ("smollm", "a 123½ x", ["a", " ", "1", "2", "3", "½", " x"]),
        ("llama-bpe", "I'VE 12345\n\n x", ["I", "'VE", " ", "123", "45", "\n\n", " x"]),
        ("llama-bpe", "(word) _x\r\n", ["(word", ")", " _", "x", "\r\n"]),
        ("qwen2", "I'VE 12345", ["I", "'VE", " ", "1", "2", "3", "4", "5"]),
        ("tekken", "mixedCASE CamelCaseWord 12", ["mixed", "CASE", " Camel", "Case", "Word", " ", "1", "2"]),
        ("tekken", "don't a//\n", ["don", "'t", " a", "//\n"]),
        ("gpt-4o", "CamelCase's 1234", ["Camel", "Case's", " ", "123", "4"]),
        ("deepseek-v3", "12345日本x!", ["123", "45", "日本", "x", "!"]),
        ("deepseek-coder", "a\n 12,日", ["a", "\n", " ", "1", "2", ",", "日"]),
        ("qwen35", "e\u0301x\u0301", ["e\u0301x\u0301"]),
        ("default", "a+b 1234", ["a", "+", "b", " ", "123", "4"]),
    ],
)
def test_words_of_a_family(name: str, text: str, expected: list[str]) -> None:
    assert words(name, text) == expected


@settings(max_examples=150)
@given(text=st.text(alphabet="aZéЖ日1½ \n\r\t.'/_+🙂\u0301\u00a0sStT", max_size=25), data=st.data())
def test_patterns_match_as_another_regex_engine_matches_them(text: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["gpt-2", "llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o"]))
    (pattern,) = PRE_TOKENIZATIONS[name].patterns
    assert words(name, text) == regex.findall(pattern, text)
