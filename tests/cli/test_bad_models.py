"""What is wrong with a model is told in one line, with exit code 2, before anything is computed."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import Result

from tests.tiny_model import write_tiny_llama

Run = Callable[..., Result]


def refused(run: Run, model: Path) -> str:
    """The message for a model that cannot be used."""
    result = run("generate", "--model", str(model), "--prompt", "x", "--no-compile-cache")
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    assert "Traceback" not in result.stderr
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return message


def test_a_missing_file(run: Run, tmp_path: Path) -> None:
    assert "absent.gguf" in refused(run, tmp_path / "absent.gguf")


def test_a_folder_without_a_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "folder" in refused(run, tmp_path / "folder")


def test_a_name_that_nobody_knows(run: Run, tmp_path: Path) -> None:
    assert "smollm2-135m-instruct" in refused(run, Path("smollm2-135m-instruckt"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file(run: Run, tmp_path: Path, tiny_model_path: Path, share: float) -> None:
    whole = tiny_model_path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(len(whole) * share)])
    assert "cut.gguf" in refused(run, cut)


def test_a_mutated_header(run: Run, tmp_path: Path, tiny_model_path: Path) -> None:
    content = bytearray(tiny_model_path.read_bytes())
    content[8:16] = b"\xff" * 8  # number of tensors
    bad = tmp_path / "mutated.gguf"
    bad.write_bytes(content)
    assert "18446744073709551615" in refused(run, bad)


def test_an_unknown_architecture(run: Run, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "other.gguf", architecture="mamba")
    message = refused(run, path)
    assert "general.architecture" in message
    assert "'mamba'" in message
    assert "llama" in message  # what there is instead


def test_a_tensor_type_that_is_not_implemented(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "type.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 64), np.float64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refused(run, path)
    assert "'token_embd.weight'" in message
    assert "'F64'" in message
    assert "IQ3_XXS" in message  # what there is instead
