"""Folders of `atoma-jax convert` are models, and their weights lie inside of them."""

from pathlib import Path

import pytest

from atoma_jax.errors import ConfigError
from atoma_jax.loading.fetch import hub


def test_a_folder_of_convert_is_one_model_beside_its_metadata(tmp_path: Path) -> None:
    for name in ("model.json", "metadata.gguf"):
        (tmp_path / name).write_bytes(b"")
    assert hub.resolve(str(tmp_path)).kind == "gguf"  # without weights: something else that is called model.json
    (tmp_path / "weights").mkdir()
    found = hub.resolve(str(tmp_path))
    assert (found.kind, found.path) == ("orbax", tmp_path)


def test_weights_of_a_folder_of_convert_may_not_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model" / "model.json").write_bytes(b"")
    (tmp_path / "model" / "weights").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="leads out of"):
        hub.resolve(str(tmp_path / "model"))
