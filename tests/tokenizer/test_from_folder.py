"""A tokenizer built from a Hugging Face folder equals the library that wrote it, and damaged files are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from atoma_jax.errors import ModelNotFoundError, UnsupportedModelError, WeightFileError
from atoma_jax.tokenizer import load_folder_tokenizer

SHARED_FOLDER = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


@SHARED_FOLDER
@given(text=st.text(max_size=60))
def test_json_ids_equal_the_library_and_decode_to_the_text(json_folder: Path, text: str) -> None:
    library = tokenizers.Tokenizer.from_file(str(json_folder / "tokenizer.json"))
    ours = load_folder_tokenizer(json_folder)
    assert ours.encode(text) == library.encode(text).ids
    assert ours.decode(ours.encode(text)) == text


@SHARED_FOLDER
@given(text=st.text(max_size=60))
def test_sentencepiece_ids_equal_the_library_and_decode_to_the_text(sentencepiece_folder: Path, text: str) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    ours = load_folder_tokenizer(sentencepiece_folder)
    assert ours.encode(text) == [1, *library.encode(text)]
    assert ours.decode(ours.encode(text)) == text.replace("▁", " ")


def test_what_goes_around_a_prompt_is_the_files_post_processor_unless_flags_say_otherwise(json_folder: Path) -> None:
    assert load_folder_tokenizer(json_folder).encode("") == [0]
    names = {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}}
    write(json_folder, "tokenizer_config.json", {**names, "add_bos_token": False, "add_eos_token": True})
    ours = load_folder_tokenizer(json_folder)
    assert ours.encode("") == [1]
    assert ours.bos_token_id == 0


def test_control_tokens_of_a_json_file_are_parsed_on_request(json_folder: Path) -> None:
    ours = load_folder_tokenizer(json_folder)
    assert 2 not in ours.encode("a<|im_end|>")
    assert ours.encode("a<|im_end|>", parse_special=True)[-1] == 2
    assert ours.special_ids == {0, 1, 2}
    assert ours.token_to_id("<think>") in ours.encode("a<think>")


def test_ids_of_added_tokens_survive_gaps(json_folder: Path) -> None:
    """Files of fine-tuned models leave ids out; a second tokenizer that numbers in order would shift them."""
    state = json.loads((json_folder / "tokenizer.json").read_text())
    for token in state["added_tokens"]:
        if token["content"] == "<think>":
            token["id"] += 7
    write(json_folder, "tokenizer.json", state)
    library = tokenizers.Tokenizer.from_file(str(json_folder / "tokenizer.json"))
    ours = load_folder_tokenizer(json_folder)
    for parse in (False, True):
        assert ours.encode("a<think>b", parse_special=parse) == library.encode("a<think>b").ids


def test_end_tokens_come_from_the_generation_config_too(json_folder: Path) -> None:
    write(json_folder, "generation_config.json", {"eos_token_id": [5, 7]})
    assert load_folder_tokenizer(json_folder).eos_token_ids == {2, 5, 7}  # 2 is <|im_end|>, known by its name
    write(json_folder, "generation_config.json", {"eos_token_id": 9})
    assert load_folder_tokenizer(json_folder).eos_token_ids == {2, 9}


def test_a_json_file_in_sentencepiece_spelling(tmp_path: Path) -> None:
    """As converters write Llama 2, Mistral 7B and Gemma: spaces as ▁, byte tokens, a space put in front."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for text in ["▁", "h", "i", "hi", "▁hi"]:
        vocab[text] = len(vocab)
    merges = [("h", "i"), ("▁", "hi")]
    core = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.save(str(tmp_path / "tokenizer.json"))
    ours = load_folder_tokenizer(tmp_path)
    for text in ["hi", "hi hi", "🙂 hi", " hi", "\n", ""]:
        assert ours.encode(text) == core.encode(text).ids
        assert ours.decode(ours.encode(text)) == text == core.decode(core.encode(text).ids)
    assert ours.token_bytes(vocab["<0x0A>"]) == b"\n"


def test_tokens_that_the_config_adds_to_sentencepiece(sentencepiece_folder: Path) -> None:
    added = {"420": {"content": "<|im_end|>", "special": True}, "421": {"content": "<think>", "special": False}}
    write(sentencepiece_folder, "tokenizer_config.json", {"added_tokens_decoder": added})
    ours = load_folder_tokenizer(sentencepiece_folder)
    assert ours.vocab_size == 422
    assert ours.encode("<|im_end|><think>", add_special_tokens=False, parse_special=True) == [420, 421]
    assert 420 not in ours.encode("<|im_end|>")
    assert 421 in ours.encode("<think>")
    assert 420 in ours.eos_token_ids


def test_chat_templates_of_a_folder(json_folder: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    write(json_folder, "tokenizer_config.json", {"chat_template": "one {{ messages[0].content }}"})
    assert load_folder_tokenizer(json_folder).apply_chat_template(messages) == "one hi"
    named = [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "three {{ tools|length }}"}]
    write(json_folder, "tokenizer_config.json", {"chat_template": named})
    ours = load_folder_tokenizer(json_folder)
    assert ours.apply_chat_template(messages) == "two"
    assert ours.apply_chat_template(messages, tools=[{"name": "f"}]) == "three 1"
    assert ours.apply_chat_template(messages, chat_template="tool_use", tools=[]) == "three 0"
    write(json_folder, "chat_template.jinja", "four")
    assert load_folder_tokenizer(json_folder).apply_chat_template(messages) == "four"


DAMAGE: list[tuple[str, Any, str]] = [
    ("tokenizer.json", "{", "tokenizer.json"),
    ("tokenizer.json", "{}", "tokenizer.json"),
    ("tokenizer_config.json", "[1]", "tokenizer_config.json: must be a JSON object"),
    ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json: must be JSON"),
    ("tokenizer_config.json", {"bos_token": 5}, "tokenizer_config.json: bos_token"),
    ("tokenizer_config.json", {"add_bos_token": 1}, "tokenizer_config.json: add_bos_token"),
    ("tokenizer_config.json", {"add_bos_token": True}, "add_bos_token: needs a bos_token"),
    ("tokenizer_config.json", {"chat_template": 5}, "tokenizer_config.json: chat_template"),
    ("tokenizer_config.json", {"chat_template": [{"name": "x"}]}, "tokenizer_config.json: chat_template"),
    ("generation_config.json", {"eos_token_id": "x"}, "generation_config.json: eos_token_id"),
    ("generation_config.json", {"eos_token_id": [10**9]}, "generation_config.json: eos_token_id"),
    ("generation_config.json", " " * (2 << 20), "generation_config.json: must have at most 1048576 bytes"),
]


@pytest.mark.parametrize(("name", "value", "message"), DAMAGE)
def test_damaged_files_are_refused_by_name(json_folder: Path, name: str, value: Any, message: str) -> None:
    write(json_folder, name, value)
    with pytest.raises(WeightFileError, match=message):
        load_folder_tokenizer(json_folder)


def test_files_that_are_no_utf8_are_refused(json_folder: Path) -> None:
    (json_folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(WeightFileError, match=r"chat_template\.jinja: must be UTF-8"):
        load_folder_tokenizer(json_folder)


def test_damaged_sentencepiece_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff")
    with pytest.raises(WeightFileError, match=r"tokenizer\.model: must be a sentencepiece model"):
        load_folder_tokenizer(tmp_path)


def test_decoders_that_are_not_implemented_are_refused(json_folder: Path) -> None:
    state = json.loads((json_folder / "tokenizer.json").read_text())
    state["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    write(json_folder, "tokenizer.json", state)
    with pytest.raises(UnsupportedModelError, match=r"decoder: must be ByteLevel, .*, got 'WordPiece'"):
        load_folder_tokenizer(json_folder)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"must hold tokenizer\.json or tokenizer\.model"):
        load_folder_tokenizer(tmp_path)
