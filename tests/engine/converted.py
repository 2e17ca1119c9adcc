"""Folders of `atoma-jax convert` in tests: loading them, and breaking them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atoma_jax.config import ModelConfig
from atoma_jax.engine.model_setup import ModelSetup, set_up_model
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.model_files import open_model

Loaded = tuple[ModelSetup, dict[str, Any]]


def load(model: Path, **settings: Any) -> Loaded:
    """A model's plan and its weights."""
    config = ModelConfig(model=str(model), **settings)
    with open_model(resolve(config.model), max_model_len=config.max_model_len) as files:
        setup = set_up_model(config, files)
        return setup, setup.load_values(threads=2)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes `model.json`."""
    values = json.loads((folder / "model.json").read_text())
    change(values)
    (folder / "model.json").write_text(json.dumps(values))


def some_file(folder: Path) -> Path:
    """The largest file of the weights."""
    return max(
        (path for path in (folder / "weights").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
