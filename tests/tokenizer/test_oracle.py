"""The real models' tokenizers give llama.cpp's ids, for thirty awkward strings and for a chat prompt."""

import json
from pathlib import Path

import pytest

from atoma_jax.loading.gguf.file import GGUFFile
from atoma_jax.tokenizer import Tokenizer, load_gguf_tokenizer

ORACLE = json.loads((Path(__file__).parents[1] / "data" / "oracle_tokenize.json").read_text())
STRINGS: list[str] = ORACLE["strings"]

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return load_gguf_tokenizer(GGUFFile.open(smollm2_path).metadata)


@pytest.fixture(scope="module")
def gemma3(gemma3_path: Path) -> Tokenizer:
    return load_gguf_tokenizer(GGUFFile.open(gemma3_path).metadata)


@pytest.mark.parametrize("i", range(len(STRINGS)), ids=[repr(text)[:24] for text in STRINGS])
def test_smollm2_ids_equal_llama_cpp(smollm2: Tokenizer, i: int) -> None:
    plain, with_special, _ = ORACLE["tok"]["smollm2"][i]
    assert smollm2.encode(STRINGS[i], add_special_tokens=False) == plain
    assert smollm2.encode(STRINGS[i], add_special_tokens=False, parse_special=True) == with_special
    assert smollm2.decode(plain) == STRINGS[i]


@pytest.mark.parametrize("i", range(len(STRINGS)), ids=[repr(text)[:24] for text in STRINGS])
def test_gemma3_ids_equal_llama_cpp(gemma3: Tokenizer, i: int) -> None:
    plain, with_special, _ = ORACLE["tok"]["gemma3"][i]
    assert gemma3.encode(STRINGS[i], add_special_tokens=False) == plain
    assert gemma3.encode(STRINGS[i], add_special_tokens=False, parse_special=True) == with_special
    assert gemma3.encode(STRINGS[i]) == [2, *plain]  # this file asks for BOS
    assert gemma3.decode(plain) == STRINGS[i].replace("▁", " ")  # sentencepiece has no other spelling of a space


def test_smollm2_chat_prompt_equals_llama_cpp(smollm2: Tokenizer) -> None:
    messages = [{"role": "user", "content": "What is the largest planet in the solar system?"}]
    rendered = smollm2.apply_chat_template(messages)
    assert rendered == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the largest planet in the solar system?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm2.encode(rendered, add_special_tokens=False, parse_special=True) == [
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2,
        198, 1, 4093, 198, 1780, 314, 260, 3995, 3925, 281, 260, 3693, 817, 47, 2, 198, 1, 520, 9531, 198,
    ]  # fmt: skip


def test_end_of_turn_tokens_end_an_answer(smollm2: Tokenizer, gemma3: Tokenizer) -> None:
    assert smollm2.eos_token_ids == {0, 2}  # <|endoftext|> and the declared <|im_end|>
    assert gemma3.eos_token_ids == {1, 106}  # the declared <eos> and <end_of_turn>, and not HTML's </s>
