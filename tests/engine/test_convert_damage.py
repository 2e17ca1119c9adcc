"""A converted folder that is damaged, or made of two, is refused by the name of what is wrong in it."""

import json
import shutil
from pathlib import Path

import pytest

from atoma_jax import LLM
from atoma_jax.config import ModelConfig
from atoma_jax.engine.convert import convert_model
from atoma_jax.errors import WeightFileError
from atoma_jax.loading.orbax.checkpoint import OrbaxModel
from tests.engine.conftest import BUCKETS, SIZES
from tests.engine.converted import edit, load, some_file
from tests.tiny_model import write_tiny_llama


def test_a_truncated_file(copied: Path) -> None:
    path = some_file(copied)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightFileError) as caught:
        load(copied)
    assert path.name in caught.value.field


def test_a_missing_file(copied: Path) -> None:
    some_file(copied).unlink()
    with pytest.raises(WeightFileError, match="is missing"):
        load(copied)


def test_a_file_that_nobody_wrote(copied: Path) -> None:
    (copied / "weights" / "d" / "more").touch()
    with pytest.raises(WeightFileError, match="not named in"):
        load(copied)


def test_a_link(copied: Path, tmp_path: Path) -> None:
    path = some_file(copied)
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WeightFileError, match="regular file"):
        load(copied)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.9])
def test_a_changed_byte(copied: Path, place: float) -> None:
    path = some_file(copied)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightFileError, match="CRC-32") as caught:
        load(copied)
    assert path.name in caught.value.field


def test_weights_of_another_type_than_the_folder_says(dense: Path) -> None:
    edit(dense, lambda values: values["forms"]["embed"].update(dtype="bfloat16"))
    with pytest.raises(WeightFileError, match=r"must be an array \(\d+, 64\) of bfloat16") as caught:
        OrbaxModel.open(dense).load(threads=1, on_bytes=lambda _: None)
    assert "'embed'" in caught.value.field


def test_weights_of_another_model(copied: Path, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "wide.gguf", width=128)
    convert_model(ModelConfig(model=str(tmp_path / "wide.gguf")), tmp_path / "wide")
    shutil.rmtree(copied / "weights")
    shutil.copytree(tmp_path / "wide" / "weights", copied / "weights")
    other = json.loads((tmp_path / "wide" / "model.json").read_text())
    edit(copied, lambda values: values.update(files=other["files"]))
    with pytest.raises(WeightFileError, match="must be an array"):
        load(copied)


def test_a_tokenizer_of_another_model(copied: Path) -> None:
    (copied / "metadata.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightFileError) as caught:
        LLM(str(copied), **SIZES, **BUCKETS)
    assert "metadata.gguf" in caught.value.field
