"""`atoma-jax convert`: a folder that every command takes, and the way back; refusals end with 2 and leave nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import Result

from atoma_jax.native.library import library
from tests.tiny_model import write_tiny_llama

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a tiny model."""
    folder = tmp_path_factory.mktemp("convert")
    write_tiny_llama(folder / "tiny.gguf", embedding_scale=0.35)
    return folder


def test_there_and_back(run: Run, folder: Path, small_engine: tuple[str, ...]) -> None:
    there = run("convert", str(folder / "tiny.gguf"), str(folder / "tiny"), "--threads", "1", "--json")
    assert there.exit_code == 0, there.stderr
    value = json.loads(there.stdout)
    layout = "tiles" if library() else "rows"
    assert (value["path"], value["kind"], value["weight_layout"]) == (str(folder / "tiny"), "orbax", layout)
    assert set(value["seconds"]) == {"read", "write", "restore"}
    again = run("convert", str(folder / "tiny.gguf"), str(folder / "tiny"), "--force")
    assert "s from here, checksums included, and were in" in again.stderr
    assert again.stderr.rstrip().endswith(f"s from {folder / 'tiny.gguf'}")
    back = run("convert", str(folder / "tiny"), str(folder / "back.gguf"), "--to", "gguf")
    assert (back.exit_code, back.stdout) == (0, f"{folder / 'back.gguf'}\n"), back.stderr
    assert "MB written" in back.stderr
    before, after = (
        {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        for reader in (gguf.GGUFReader(folder / name) for name in ("tiny.gguf", "back.gguf"))
    )
    assert set(after) == set(before)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)
    texts = []
    for model in ("tiny.gguf", "tiny"):
        flags = ("--prompt", "the cat", "--max-tokens", "8", "--temperature", "0", "--json")
        result = run("generate", "--model", str(folder / model), *small_engine, *flags)
        assert result.exit_code == 0, result.stderr
        answer = json.loads(result.stdout)
        texts.append(answer["outputs"][0]["text"])
        assert ("restore" in answer["timings"]["startup_phases_s"]) == (model == "tiny")
    assert texts[0] == texts[1]
    plans = [json.loads(run("plan", str(folder / model), "--json").stdout) for model in ("tiny.gguf", "tiny")]
    assert plans[0]["weights"] == plans[1]["weights"]
    assert plans[0]["parameters"] == plans[1]["parameters"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny.gguf", "out", "--to", "onnx"), "to: must be one of orbax, gguf"),
        (("tiny.gguf", "out", "--weight-layout", "columns"), "weight_layout: must be one of auto, rows, planar"),
        (("tiny.gguf", "out", "--quantization", "int8"), "quantization"),
        (("tiny.gguf", "out.gguf", "--to", "gguf", "--quantization", "int8"), "atoma-jax quantize"),
        (("tiny.gguf", "out.gguf", "--to", "gguf"), "must be a folder of `atoma-jax convert`"),
        (("tiny.gguf", "absent/out"), "make it first"),
        (("absent.gguf", "out"), "absent.gguf"),
        (("tiny.gguf", "tiny.gguf"), "exists"),
        (("tiny.gguf", "tiny.gguf", "--force"), "--force replaces nothing else"),
    ],
)
def test_refusals(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    result = run("convert", *arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    assert message in result.stderr
    assert sorted(folder.iterdir()) == before
