"""The ternary test model's folder and its GGUF file are one model: weights bit by bit, sizes, vocabulary."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from atoma_jax.loading.gguf.file import GGUFFile
from atoma_jax.loading.hf.checkpoint import HFCheckpoint
from atoma_jax.tokenizer import load_folder_tokenizer, load_gguf_tokenizer
from bench.ternary import export
from tests.models.bitnet_reference import BitNetReference

DATA = Path(__file__).parents[1] / "data" / "ternary"
GGUF_FILE = DATA / "model-TQ2_0.gguf"
Q = gguf.GGMLQuantizationType
MOST_BYTES = 4_000_000
TEXTS = ["In the beginning", "God's 3 days;\n\n  and\ttwo  nights.", "naïve ½ 日本 🙂", ""]


def weights_of(path: Path) -> dict[str, np.ndarray]:
    """By the names in the file, decoded by the `gguf` package."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def test_both_files_hold_bit_identical_weights():
    folder, file = BitNetReference(DATA / "hf").weights, weights_of(GGUF_FILE)
    assert {export.file_name_of(name) for name in folder} == set(file)
    for name, expected in folder.items():
        found = file[export.file_name_of(name)]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.reshape(expected.shape), expected, err_msg=name)


def test_this_engines_readers_see_the_same_weights_in_both_files():
    with HFCheckpoint.open(DATA / "hf") as folder, GGUFFile.open(GGUF_FILE) as file:
        assert {export.file_name_of(name) for name in folder.tensors} == set(file.tensors)
        for name, tensor in folder.tensors.items():
            other, rows = file.tensors[export.file_name_of(name)], slice(0, int(np.prod(tensor.shape[:-1])))
            assert tensor.shape == other.shape, name
            np.testing.assert_array_equal(tensor.dequantize(rows), other.dequantize(rows), err_msg=name)


def test_matrices_are_ternary_the_embedding_f16_and_norms_f32():
    kinds = {t.name: (len(t.shape), t.tensor_type) for t in gguf.GGUFReader(GGUF_FILE).tensors}
    assert kinds.pop("token_embd.weight") == (2, Q.F16)
    assert {kind for _, kind in kinds.values()} == {Q.TQ2_0, Q.F32}
    assert all((kind is Q.TQ2_0) == (rank == 2) for rank, kind in kinds.values())


@pytest.mark.parametrize("kind", [Q.TQ1_0, Q.TQ2_0])
def test_a_gguf_file_made_from_the_folder_is_the_same_model(tmp_path, kind):
    export.write_gguf(tmp_path / "model.gguf", *export.read_folder(DATA / "hf"), kind=kind)
    found, expected = weights_of(tmp_path / "model.gguf"), weights_of(GGUF_FILE)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_the_committed_file_is_what_the_script_writes(tmp_path):
    export.write_gguf(tmp_path / "model.gguf", *export.read_folder(DATA / "hf"))
    assert (tmp_path / "model.gguf").read_bytes() == GGUF_FILE.read_bytes()


def test_packing_four_rows_a_byte_is_undone():
    codes = np.random.default_rng(0).integers(-1, 2, (12, 5)).astype(np.int8)
    packed = export.pack(codes)
    assert packed.shape == (3, 5)
    assert packed[1, 2] == sum((int(codes[1 + 3 * i, 2]) + 1) << (2 * i) for i in range(4))
    np.testing.assert_array_equal(export.unpack(packed), codes)


@pytest.mark.parametrize("text", TEXTS)
def test_both_tokenizers_give_the_same_ids(text):
    folder = load_folder_tokenizer(DATA / "hf")
    with GGUFFile.open(GGUF_FILE) as file:
        ours = load_gguf_tokenizer(file.metadata)
    ids = folder.encode(text)
    assert ids == ours.encode(text)
    assert (folder.bos_token_id, folder.eos_token_ids) == (ours.bos_token_id, ours.eos_token_ids)
    assert folder.decode(ids) == text


def test_the_metadata_says_what_the_configuration_says():
    config = json.loads((DATA / "hf" / "config.json").read_text())
    with GGUFFile.open(GGUF_FILE) as file:
        metadata = file.metadata
    assert metadata["general.architecture"] == export.ARCHITECTURE
    pairs = {
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "context_length": "max_position_embeddings",
        "rope.freq_base": "rope_theta",
        "vocab_size": "vocab_size",
    }
    for key, name in pairs.items():
        assert metadata[f"{export.ARCHITECTURE}.{key}"] == config[name], key
    epsilon = metadata[f"{export.ARCHITECTURE}.attention.layer_norm_rms_epsilon"]
    assert epsilon == np.float32(config["rms_norm_eps"])


def test_the_readme_gives_the_losses_of_these_weights():
    report, readme = (DATA / "training.json").read_text(), (DATA / "README.md").read_text()
    numbers = json.loads(report)
    for key, form in {"held_out_nats_a_token": ".2f", "held_out_bits_a_byte": ".2f", "tokens_seen": ","}.items():
        assert format(numbers[key], form) in readme, key
    assert numbers["continuation"] in readme


def test_the_files_are_small():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < MOST_BYTES
