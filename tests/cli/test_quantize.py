"""`atoma-jax quantize`: what it prints, and what it refuses before it writes anything."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from typer.testing import Result

from tests.tiny_model import write_tiny_llama

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("plain")
    return str(write_tiny_llama(folder / "plain.gguf", kind=gguf.GGMLQuantizationType.F16, width=256))


def types_in(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def test_a_table_for_people(run: Run, plain: str, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    result = run("quantize", plain, str(out), "--type", "q4_k_m")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[:4] for line in lines[:3]] == [
        ["Q4_K", "12", "tensors", "4.500"],
        ["Q6_K", "3", "tensors", "6.562"],
        ["F32", "5", "tensors", "32.000"],
    ]
    assert lines[-1].endswith(f"bits a weight: {out}")
    assert types_in(out)["blk.0.attn_q.weight"] == "Q4_K"


def test_json_object(run: Run, plain: str, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    result = run("quantize", plain, str(out), "--type", "Q8_0", "--json", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert value.pop("elements") > 0
    assert value.pop("source_bytes") > value["target_bytes"]
    assert value.pop("file_bytes") == out.stat().st_size
    assert value.pop("bits") == pytest.approx(8.5, abs=0.1)
    assert value.pop("target_bytes") == sum(kind["nbytes"] for kind in value["types"])
    assert [(kind["type"], kind["tensors"], kind["bits"]) for kind in value.pop("types")] == [
        ("Q8_0", 15, 8.5),
        ("F32", 5, 32.0),
    ]
    assert value == {"model": plain, "out": str(out), "type": "Q8_0", "fallbacks": {}, "requantized": []}


def test_every_flag_has_its_effect(run: Run, plain: str, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"")
    flags = ("--type", "Q4_K", "--pure", "--token-embedding-type", "q5_1", "--force")
    assert run("quantize", plain, str(out), *flags).exit_code == 0
    types = types_in(out)
    assert types["token_embd.weight"] == "Q5_1"
    assert {kind for name, kind in types.items() if name.startswith("blk.") and "norm" not in name} == {"Q4_K"}
    assert run("quantize", plain, str(out), "--type", "Q4_K", "--output-tensor-type", "F16", "--force").exit_code == 0
    assert types_in(out)["token_embd.weight"] == "F16"  # this model has no other output


def test_a_second_loss_is_warned_of(run: Run, tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "in.gguf")
    result = run("quantize", str(source), str(tmp_path / "out.gguf"), "--type", "Q4_0")
    assert result.exit_code == 0
    assert "quantized already (14 of Q8_0)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{in}", "{out}", "--type", "Q4_K_XL"), "type: must be one of F32, F16, BF16"),
        (("{in}", "{out}", "--type", "Q8_0", "--output-tensor-type", "x"), "output_tensor_type: must be one of F32"),
        (("{in}", "{in}", "--type", "Q8_0"), "out: exists; --force replaces it"),
        (("{in}", "{in}", "--type", "Q8_0", "--force"), "out: is the file to be read; name another one"),
        (("{in}", "{out}/absent/x.gguf", "--type", "Q8_0"), "which does not exist; make it first"),
        (("{in}", "{out}", "--type", "Q8_0", "--threads", "0"), "threads: must be in [1, 256], got 0."),
        (("absent.gguf", "{out}", "--type", "Q8_0"), "absent.gguf"),
        (("{in}", "{out}"), "Missing option '--type'"),
    ],
)
def test_what_cannot_be_ends_with_2(
    run: Run, plain: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    places = {"{in}": plain, "{out}": str(tmp_path / "out.gguf")}
    filled = [argument.replace("{in}", places["{in}"]).replace("{out}", places["{out}"]) for argument in arguments]
    result = run("quantize", *filled)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_safetensors_is_refused(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    result = run("quantize", str(folder), str(tmp_path / "out.gguf"), "--type", "Q8_0")
    assert result.exit_code == 2
    assert "is a folder of safetensors, and only GGUF files can be quantized" in result.stderr
