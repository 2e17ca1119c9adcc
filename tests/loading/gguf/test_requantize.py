"""A GGUF file out of another: the types that were chosen, ggml's bytes, the same metadata, the whole file or none."""

import hashlib
import logging
import resource
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from atoma_jax.errors import UserError
from atoma_jax.loading.gguf import requantize as module
from atoma_jax.loading.gguf.file import GGUFFile
from atoma_jax.loading.gguf.mixtures import MIXTURES, ModelFacts, TypeOptions, choose_types
from atoma_jax.loading.gguf.requantize import Summary, requantize
from atoma_jax.quant.ggml_types import GGMLType
from atoma_jax.quant.quantizers import quantize
from tests.tiny_model import write_tiny_llama

F16 = gguf.GGMLQuantizationType.F16


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in F16 whose matrices K types fit."""
    return write_tiny_llama(tmp_path_factory.mktemp("plain") / "plain.gguf", kind=F16, width=256)


def convert(source: Path, target: Path, mixture: str = "Q4_K_M", **options: Any) -> Summary:
    return requantize(source, target, TypeOptions.named(mixture), **{"threads": 2, **options})


def read(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values_of(tensor: gguf.ReaderTensor) -> np.ndarray:
    """The gguf package's own reading, as rows."""
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, int(tensor.shape[0])).astype(np.float32)


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_tensor_holds_what_the_quantizer_makes_of_it(plain: Path, tmp_path: Path, mixture: str) -> None:
    target = tmp_path / "out.gguf"
    convert(plain, target, mixture)
    before, after = read(plain), read(target)
    assert list(after) == list(before)
    with GGUFFile.open(plain) as file:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        choices = choose_types(shapes, ModelFacts.read(file.metadata), TypeOptions.named(mixture), "")
    assert len(choices) == 15  # the embedding and seven matrices a layer
    for name, tensor in after.items():
        assert tensor.shape.tolist() == before[name].shape.tolist()
        if name not in choices:
            assert tensor.tensor_type == before[name].tensor_type
            np.testing.assert_array_equal(tensor.data, before[name].data)
            continue
        kind = choices[name].type
        assert GGMLType(tensor.tensor_type) is kind
        raw = tensor.data.view(np.uint8).reshape(-1, tensor.data.view(np.uint8).shape[-1])
        np.testing.assert_array_equal(raw, quantize(values_of(before[name]), kind))


@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_engines_reader_takes_the_file_and_reads_the_same_numbers(
    plain: Path, tmp_path: Path, mixture: str
) -> None:
    target = tmp_path / "out.gguf"
    convert(plain, target, mixture)
    after = read(target)
    with GGUFFile.open(target) as file:
        for name, tensor in file.tensors.items():
            np.testing.assert_array_equal(tensor.dequantize(slice(None)), values_of(after[name]))


@pytest.mark.slow
@pytest.mark.model
def test_all_weights_of_a_real_model_are_quantized_as_llama_cpp_does_it(smollm2_path: Path, tmp_path: Path) -> None:
    """sha256 of all tensors by name, recorded from a file that llama.cpp's quantizer made as Q4_K_M of the same one."""
    target = tmp_path / "out.gguf"
    convert(smollm2_path, target)
    digest = hashlib.sha256()
    for name, tensor in sorted(read(target).items()):
        digest.update(name.encode() + tensor.data.tobytes())
    assert digest.hexdigest() == "213bb6ba4ae80b99feae98403292c8851ede313cf136a6b4c63a4bacc89de364"


def test_metadata_are_the_same_bytes_but_for_the_file_type(plain: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    convert(plain, target, "Q5_K_S")
    before, after = gguf.GGUFReader(plain).fields, gguf.GGUFReader(target).fields
    changed = {"general.file_type", "general.quantization_version"}
    counts = {"GGUF.kv_count"}
    assert after.keys() == before.keys() | changed
    for key in before.keys() - changed - counts:
        assert after[key].types == before[key].types, key
        assert [part.tobytes() for part in after[key].parts] == [part.tobytes() for part in before[key].parts], key
    for key, value in (("general.file_type", 16), ("general.quantization_version", 2)):
        assert (after[key].contents(), after[key].types) == (value, [gguf.GGUFValueType.UINT32])


def test_a_file_type_that_was_there_is_replaced(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "once.gguf", "Q8_0")
    convert(tmp_path / "once.gguf", tmp_path / "twice.gguf", "F16")
    assert gguf.GGUFReader(tmp_path / "twice.gguf").fields["general.file_type"].contents() == 1


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_the_alignment_of_the_source_is_kept(tmp_path: Path, alignment: int) -> None:
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "llama")
    writer.add_custom_alignment(alignment)
    rng = np.random.default_rng(0)
    for name, shape in {"a.weight": (3, 32), "b.weight": (5,), "c.weight": (7, 96)}.items():
        writer.add_tensor(name, rng.normal(0, 1, shape).astype(np.float32))
    close(writer)
    convert(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q8_0")
    after = read(tmp_path / "out.gguf")
    assert all(tensor.data_offset % alignment == 0 for tensor in after.values())
    np.testing.assert_array_equal(after["c.weight"].data, quantize(rng_values(0, 3), GGMLType.Q8_0))


def rng_values(seed: int, index: int) -> np.ndarray:
    """The third tensor of the test above."""
    rng = np.random.default_rng(seed)
    drawn = [rng.normal(0, 1, shape).astype(np.float32) for shape in ((3, 32), (5,), (7, 96))]
    return drawn[index - 1]


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_shards_become_one_file(plain: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "split.gguf", "llama", split_max_tensors=5)
    writer.add_block_count(2)
    for name, tensor in read(plain).items():
        writer.add_tensor(name, tensor.data)
    close(writer)
    shards = sorted(tmp_path.glob("split-*.gguf"))
    assert len(shards) == 4
    convert(shards[2], tmp_path / "out.gguf", "Q8_0")
    convert(plain, tmp_path / "whole.gguf", "Q8_0")
    after, whole = read(tmp_path / "out.gguf"), read(tmp_path / "whole.gguf")
    assert after.keys() == whole.keys()
    for name in whole:
        np.testing.assert_array_equal(after[name].data, whole[name].data)
    assert not any(key.startswith("split.") for key in gguf.GGUFReader(tmp_path / "out.gguf").fields)
    with pytest.raises(UserError, match="out: is the file to be read"):
        convert(shards[2], shards[1], overwrite=True)


def test_what_is_quantized_already_is_decoded_first_and_a_warning_says_what_that_means(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_tiny_llama(tmp_path / "q4_1.gguf", kind=gguf.GGMLQuantizationType.Q4_1, width=256)
    with caplog.at_level(logging.WARNING):
        summary = convert(source, tmp_path / "out.gguf", "Q8_0")
    assert "15 of Q4_1" in caplog.text
    assert "prefer an F16 or BF16 file" in caplog.text
    assert summary.requantized == ("Q4_1",)
    before, after = read(source), read(tmp_path / "out.gguf")
    name = "blk.1.ffn_down.weight"
    np.testing.assert_array_equal(after[name].data, quantize(values_of(before[name]), GGMLType.Q8_0))


def test_what_has_its_type_already_is_copied_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_tiny_llama(tmp_path / "q8_0.gguf", width=256)
    summary = convert(source, tmp_path / "out.gguf", "Q8_0")
    assert summary.requantized == ()
    assert not caplog.records
    before, after = read(source), read(tmp_path / "out.gguf")
    assert all((after[name].data == before[name].data).all() for name in before)


def test_the_summary_counts_what_is_in_the_file(plain: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    summary = convert(plain, target)
    after = read(target)
    assert summary.file_bytes == target.stat().st_size
    assert summary.target_bytes == sum(int(tensor.n_bytes) for tensor in after.values())
    assert summary.source_bytes == sum(int(tensor.n_bytes) for tensor in read(plain).values())
    assert summary.elements == sum(int(tensor.n_elements) for tensor in after.values())
    assert {total.type: total.tensors for total in summary.types} == {"Q4_K": 12, "Q6_K": 3, "F32": 5}
    assert {total.type: total.bits for total in summary.types} == {"Q4_K": 4.5, "Q6_K": 6.5625, "F32": 32.0}
    assert summary.fallbacks == {}


def test_fallbacks_are_told(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "narrow.gguf", kind=F16, width=96)
    fallbacks = convert(source, tmp_path / "out.gguf").fallbacks
    assert fallbacks["blk.0.attn_q.weight"] == "Q5_0"
    assert fallbacks["blk.1.ffn_down.weight"] == "Q8_0"
    assert "token_embd.weight" not in fallbacks  # a tied output whose rows do not fit is Q8_0 by the rule itself


def test_threads_and_chunks_change_no_byte_and_progress_reaches_the_end(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(plain, tmp_path / "one.gguf", "Q8_0", threads=1)
    monkeypatch.setattr(module, "_CHUNK", 5000)
    seen: list[tuple[int, int]] = []
    summary = convert(plain, tmp_path / "four.gguf", "Q8_0", threads=4, on_progress=lambda *at: seen.append(at))
    assert (tmp_path / "four.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
    assert seen == sorted(seen)
    assert len(seen) > 100
    assert seen[-1] == (summary.elements, summary.elements)


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "llama")
    writer.add_tensor("a.weight", np.ones((16384, 256), np.float16))
    close(writer)
    monkeypatch.setattr(module, "_CHUNK", 1 << 15)
    tracemalloc.start()
    try:
        convert(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q8_0")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Four chunks of 2^15 are in the making, each with a handful of arrays of f32; the tensor has 2^22 elements.
    assert peak < 4 * (1 << 15) * 4 * 8 < 4 * (1 << 22) // 3


def spoiled(path: Path, value: float) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    bad = np.ones((4, 32), np.float32)
    bad[2, 3] = value
    writer.add_tensor("good.weight", np.ones((4, 32), np.float32))
    writer.add_tensor("bad.weight", bad)
    close(writer)
    return path


@pytest.mark.parametrize(("value", "problem"), [(np.nan, "must be finite"), (1e6, "at most 65504")])
def test_a_failure_names_the_tensor_and_leaves_nothing_behind(tmp_path: Path, value: float, problem: str) -> None:
    source = spoiled(tmp_path / "in.gguf", value)
    target = tmp_path / "out.gguf"
    with pytest.raises(UserError, match=rf"in\.gguf: tensor 'bad\.weight': .*{problem}"):
        convert(source, target, "Q8_0")
    assert left_behind(tmp_path) == ["in.gguf"]
    target.write_bytes(b"precious")
    with pytest.raises(UserError, match=problem):
        convert(source, target, "Q8_0", overwrite=True)
    assert left_behind(tmp_path) == ["in.gguf", "out.gguf"]
    assert target.read_bytes() == b"precious"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 20_000])
def test_a_disk_that_is_full_is_told_and_leaves_nothing_behind(plain: Path, tmp_path: Path, size: int) -> None:
    with largest_file(size), pytest.raises(UserError, match=r"out: cannot be written \(File too large\)"):
        convert(plain, tmp_path / "out.gguf")
    assert left_behind(tmp_path) == []


def test_an_existing_file_is_replaced_only_on_request(plain: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    target.write_bytes(b"precious")
    with pytest.raises(UserError, match="out: exists; --force replaces it"):
        convert(plain, target)
    assert target.read_bytes() == b"precious"
    convert(plain, target, overwrite=True)
    assert read(target)


def test_targets_that_cannot_be_are_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs the folder .*absent, which does not exist; make it first"):
        convert(plain, tmp_path / "absent" / "out.gguf")
    with pytest.raises(UserError, match="is a folder or device"):
        convert(plain, tmp_path, overwrite=True)
    link = tmp_path / "link.gguf"
    link.symlink_to(plain)
    with pytest.raises(UserError, match="is the file to be read"):
        convert(plain, link, overwrite=True)
    with pytest.raises(UserError, match=r"cannot be written \(File name too long\)"):
        convert(plain, tmp_path / ("x" * 245 + ".gguf"))


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_threads_have_limits(plain: Path, tmp_path: Path, threads: int) -> None:
    with pytest.raises(UserError, match=rf"threads: must be in \[1, 256\], got {threads}"):
        convert(plain, tmp_path / "out.gguf", threads=threads)
