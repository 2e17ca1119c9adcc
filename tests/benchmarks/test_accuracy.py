"""The accuracy table: which rows, how many bits, what the page says; on a tiny model, from file to table."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import typer

from bench import accuracy
from bench.accuracy import ROWS, Meter, RowError, Workshop, bits, measure, read_results, select
from bench.accuracy_report import render
from bench.ggml_files import type_of
from tests.tiny_model import write_tiny_llama

Types = gguf.GGMLQuantizationType
HEADER = {"model": "m", "text": "t.txt", "max_tokens": 64, "dtype": "float32"}
MACHINE = {
    "versions": {"jax": "1.2"},
    "platform": "cpu",
    "device": "cpu",
    "num_devices": 1,
    "cpu_cores": 2,
    "cpu": "a processor",
    "date": "2026-11-25T10:00:00+00:00",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accuracy")
    return write_tiny_llama(folder / "F32.gguf", kind=Types.F32, embedding_scale=0.35, width=256)


@pytest.fixture(scope="module")
def meter(base: Path) -> Meter:
    return Meter(base, "in the hat a cat sat on the mat and ate " * 2, 32, "float32")


@pytest.fixture
def workshop(base: Path) -> Workshop:
    """Its base is there, so nothing is quantized for it."""
    return Workshop(str(base), base.parent)


def test_rows_are_chosen_by_name_and_stay_in_order() -> None:
    assert [row.name for row in select("KV:int8,Q8_0,F32")] == ["F32", "Q8_0", "KV:int8"]
    assert len(select(",".join(ROWS))) == len(ROWS)


@pytest.mark.parametrize("names", ["Q8_0,Q9_Z", "", ","])
def test_rows_that_there_are_none_of_are_refused_by_name(names: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"rows are F32, source, F16"):
        select(names)


def test_peers_lines_are_in_the_ladder() -> None:
    ladder = json.loads((accuracy.ROOT / "tests" / "data" / "ladder_smollm2.json").read_text())
    assert {row.peer for row in ROWS.values() if row.peer} == set(ladder) - {"KV:q4_0"}


def test_bits_count_every_parameter_and_every_byte(base: Path, tmp_path: Path) -> None:
    """Of Q8_0: f16 scales in the file and packed, f32 scales in rows, one for 32 codes of 8 bits; norms are f32."""
    assert bits({"model": str(base)}) == {"file_bits": 32, "planar_bits": 32, "rows_bits": 32}
    path = write_tiny_llama(tmp_path / "q8.gguf", kind=Types.Q8_0, width=256)
    tensors = gguf.GGUFReader(path).tensors
    matrices = sum(int(tensor.n_elements) for tensor in tensors if tensor.tensor_type is Types.Q8_0)
    norms = sum(int(tensor.n_elements) for tensor in tensors if tensor.tensor_type is Types.F32)

    def mean(of_a_matrix: float) -> float:
        return (of_a_matrix * matrices + 32 * norms) / (matrices + norms)

    found = bits({"model": str(path)})
    assert found["file_bits"] == pytest.approx(mean(8.5), rel=1e-12)
    assert found["planar_bits"] == pytest.approx(mean(8.5), rel=1e-12)
    assert found["rows_bits"] == pytest.approx(mean(9), rel=1e-12)


def test_bits_of_a_dense_model_that_is_quantized_while_it_loads(base: Path) -> None:
    found = bits({"model": str(base), "quantization": "int4"})
    assert found["file_bits"] == 32
    assert found["planar_bits"] < found["rows_bits"] < 32


@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.maker == "base"], ids=lambda row: row.name)
def test_the_engine_takes_every_rows_settings(base: Path, row: accuracy.Row) -> None:
    found = bits({"model": str(base), **row.settings})
    layouts = {"rows"} if row.name == "load:w8a8" else {"rows", "planar"}
    assert set(found) == {"file_bits", *(f"{layout}_bits" for layout in layouts)}


def test_a_row_holds_what_the_engine_finds(workshop: Workshop, meter: Meter) -> None:
    row = ROWS["load:int8"]
    found = measure(row, workshop.path(row), meter, dtype="float32", speed=False)
    assert found["tokens"] == 31
    assert 0 < (found["mean_kld"] or 0) < 0.1
    assert found["base_perplexity"] != found["perplexity"]
    assert found["planar_bits"] is not None
    assert "load_s" not in found
    same = measure(ROWS["F32"], workshop.path(ROWS["F32"]), meter, dtype="float32", speed=False)
    assert (same["mean_kld"], same["same_top"]) == (0, 1)


def test_blocks_of_libgguf_make_a_file_that_the_engine_reads(workshop: Workshop, meter: Meter) -> None:
    pytest.importorskip("libgguf", reason="libgguf has wheels for Linux on x86-64 only")
    row = ROWS["IQ2_XXS"]
    path = workshop.path(row)
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] is Types.Q8_0
    assert kinds["blk.1.ffn_down.weight"] is Types.IQ2_XXS
    assert kinds["output_norm.weight"] is Types.F32
    assert (measure(row, path, meter, dtype="float32", speed=False)["mean_kld"] or 0) > 0


@pytest.mark.parametrize(
    ("name", "shape", "kind", "wanted"),
    [
        ("blk.0.ffn_down.weight", (576, 1536), Types.IQ3_S, Types.IQ3_S),
        ("blk.0.attn_q.weight", (576, 576), Types.IQ3_S, Types.IQ4_NL),
        ("blk.0.attn_q.weight", (576, 576), Types.NVFP4, Types.NVFP4),
        ("blk.0.attn_q.weight", (576, 576), Types.Q1_0, Types.Q4_0),
        ("token_embd.weight", (49152, 576), Types.IQ3_S, Types.Q8_0),
        ("output_norm.weight", (576,), Types.IQ3_S, None),
    ],
)
def test_a_type_that_rows_do_not_fit_falls_back(
    name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, wanted: gguf.GGMLQuantizationType | None
) -> None:
    assert type_of(name, shape, kind) is wanted


def test_a_row_that_the_engine_refuses_fails_by_name(workshop: Workshop, meter: Meter) -> None:
    row = accuracy.Row(name="KV:int3", maker="base", settings={"kv_cache_dtype": "int3"})
    with pytest.raises(RowError, match=r"row KV:int3: kv_cache_dtype: must be one of"):
        measure(row, workshop.path(row), meter, dtype="float32", speed=False)


def test_a_row_whose_file_cannot_be_made_fails_by_name(workshop: Workshop) -> None:
    with pytest.raises(RowError, match=r"row Q9_Z: atoma-jax quantize .* ended with 2: "):
        workshop.path(accuracy.Row(name="Q9_Z"))


def test_results_of_something_else_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_results(path, HEADER) == {**HEADER, "rows": {}}
    path.write_text(json.dumps({**HEADER, "rows": {"F32": {"file_bits": 32}}}))
    assert read_results(path, HEADER)["rows"] == {"F32": {"file_bits": 32}}
    with pytest.raises(typer.BadParameter, match="max_tokens = 64, not 65: name another path"):
        read_results(path, {**HEADER, "max_tokens": 65})


def results() -> dict[str, Any]:
    size = {"file_bits": 8.5061, "planar_bits": 8.5, "rows_bits": 9.0}
    scores = {"tokens": 63, "perplexity": 20.3456, "perplexity_se": 1.66, "mean_kld": 0.00012345, "p99_kld": 0.001}
    scores |= {"log_perplexity_ratio": 0.0012, "log_perplexity_ratio_se": 0.0004, "rms_dp": 0.0147, "same_top": 0.98765}
    speed = {"load_s": 1.234, "prefill_tokens_per_s": 512.34, "decode_tokens_per_s": 67.891}
    return {**HEADER, "machine": MACHINE, "rows": {"Q8_0": {**size, **scores}, "Q4_0": {**size, **speed}}}


def test_the_page_has_a_line_for_each_row_and_dashes_for_what_was_not_measured() -> None:
    page = render(results(), ["Q8_0", "Q4_0"], {})
    scored = "| Q8_0 | 8.51 | 8.50 | 9.00 | 20.35 ± 1.66 | 0.0012 ± 0.0004 | 0.0001234 | 0.001 | 1.47 % | 98.77 % "
    scored += "| – | – | – |"
    timed = "| Q4_0 | 8.51 | 8.50 | 9.00 | – | – | – | – | – | – | 1.234 s | 512.3 | 67.89 |"
    assert f"{scored}\n{timed}\n" in page
    assert "`t.txt`, 63 tokens scored" in page
    assert "Accuracy: 2 cores of a processor; jax 1.2; 2026-11-25." in page
    assert "Times:" not in page
    assert "llama.cpp's own quantizer" not in page
    head = next(line for line in page.splitlines() if line.startswith("| row"))
    assert head.count("|") == scored.count("|") == timed.count("|")


def test_llama_cpps_numbers_stand_beside_those_of_the_same_rows() -> None:
    peers = {
        "F32": {"ppl": 20.0, "kld": 0.0, "same_top": 1.0},
        "Q8_0": {"ppl": 22.0, "kld": 0.0045, "same_top": 0.959},
    }
    page = render(results(), ["Q8_0", "Q4_0"], peers)
    assert "| Q8_0 | 0.0012 ± 0.0004 | 0.09531 | 0.0001234 | 0.0045 | 98.77 % | 95.90 % |" in page
    assert "| F32 |" not in page  # it was not measured
