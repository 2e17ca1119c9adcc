"""Small tokenizers trained in the test run, each with the library's own object as the reference."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from atoma_jax.tokenizer import Tokenizer, load_gguf_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "It's 12:45 now; we'll see whether they've finished counting 1234567890 sheep.",
    "def add(a, b):\n    return a + b  # sums\n",
    "Grüße aus Köln, naïve café résumé — dreißig Euro.",
    "Привет мир, добрый день. 日本語のテキスト、中文测试。",
    "aaaa aaa aa a bbbb bbb bb b  two  spaces   three",
] * 8
CONTROL = ["<|bos|>", "<|eos|>", "<|im_end|>"]


@dataclass(frozen=True)
class Reference:
    """A tokenizer of ours and the library object that trained it."""

    ours: Tokenizer
    library: Any
    metadata: dict[str, Any]


def train_byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer as GPT-2's, with three control tokens and one that is user-defined."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    core.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    return core


@pytest.fixture(scope="session")
def byte_level() -> Reference:
    core = train_byte_level()
    texts = [core.id_to_token(i) for i in range(core.get_vocab_size())]
    kinds = [3 if text in CONTROL else 4 if text == "<think>" else 1 for text in texts]
    merges: list[list[str]] = json.loads(core.model.__getstate__())["merges"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return Reference(load_gguf_tokenizer(metadata), core, metadata)


def train_sentencepiece(**options: Any) -> bytes:
    """A sentencepiece BPE model with byte tokens, and nothing done to the text but the space in front."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def spm() -> Reference:
    processor = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece())
    ids = range(processor.vocab_size())
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [
            2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
            for i in ids
        ],
    }
    return Reference(load_gguf_tokenizer(metadata), processor, metadata)


@pytest.fixture
def sentencepiece_folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece())
    return tmp_path


@pytest.fixture
def json_folder(tmp_path: Path) -> Path:
    core = train_byte_level()
    core.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    core.save(str(tmp_path / "tokenizer.json"))
    return tmp_path
