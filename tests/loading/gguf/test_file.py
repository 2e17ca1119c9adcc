"""The GGUF reader on files that the gguf package wrote: whole, split, cut, mutated. Crafted: test_gguf_hostile.py."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoma_jax.errors import ModelNotFoundError, UnsupportedModelError, WeightFileError
from atoma_jax.loading.checkpoint import Checkpoint
from atoma_jax.loading.gguf.file import GGUFFile
from atoma_jax.loading.gguf.metadata import Metadata
from atoma_jax.quant.ggml import SUPPORTED_TYPES
from atoma_jax.quant.ggml_types import BLOCK_SIZES, GGMLType
from tests.quant.ggml_samples import reference

V = gguf.GGUFValueType
SCALARS = {
    "a.u8": (255, V.UINT8),
    "a.i8": (-128, V.INT8),
    "a.u16": (65535, V.UINT16),
    "a.i16": (-32768, V.INT16),
    "a.u32": (2**32 - 1, V.UINT32),
    "a.i32": (-(2**31), V.INT32),
    "a.u64": (2**64 - 1, V.UINT64),
    "a.i64": (-(2**63), V.INT64),
    "a.f32": (0.5, V.FLOAT32),
    "a.f64": (0.1, V.FLOAT64),
    "a.true": (True, V.BOOL),
    "a.false": (False, V.BOOL),
    "a.str": ("Ġ語 🦙\n\0", V.STRING),
    "a.empty": ("", V.STRING),
}
ARRAYS = {
    "b.u8": ([0, 255], V.UINT8, np.uint8),
    "b.i8": ([-1, 2], V.INT8, np.int8),
    "b.u16": ([0, 65535], V.UINT16, np.uint16),
    "b.i16": ([-1, 2], V.INT16, np.int16),
    "b.u32": ([1, 2, 2**32 - 1], V.UINT32, np.uint32),
    "b.i32": ([-1, 2], V.INT32, np.int32),
    "b.u64": ([2**64 - 1], V.UINT64, np.uint64),
    "b.i64": ([-(2**63)], V.INT64, np.int64),
    "b.f32": ([0.5, -1000.0], V.FLOAT32, np.float32),
    "b.f64": ([0.1], V.FLOAT64, np.float64),
    "b.bool": ([True, False, True], V.BOOL, np.bool_),
}
STRINGS = ["", "a", "▁▁", "🦙", "Ġ the"]
FUZZ = Path(__file__).with_name("fuzz.py")
# All types that can be decoded and that the package's writer knows: it has no number for Q2_0 yet.
WRITABLE = [kind for kind in sorted(SUPPORTED_TYPES) if kind in set(gguf.GGMLQuantizationType)]


def write_sample(path: Path, *, alignment: int | None = None, **split: int) -> dict[str, np.ndarray]:
    """A file with every type of metadata and a tensor of every type of `WRITABLE`; returns the raw rows."""
    writer = gguf.GGUFWriter(path, "llama", **split)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, (value, value_type) in SCALARS.items():
        writer.add_key_value(key, value, value_type)
    for key, (values, item_type, _) in ARRAYS.items():
        writer.add_key_value(key, values, V.ARRAY, sub_type=item_type)
    writer.add_array("b.str", STRINGS)
    writer.add_key_value("b.nested", [[1, 2], [3]], V.ARRAY)
    writer.add_key_value("b.nested_str", [["x", "yz"], ["語"]], V.ARRAY)
    rng = np.random.default_rng(0)
    raws: dict[str, np.ndarray] = {}
    for ggml_type in WRITABLE:
        elements, size = BLOCK_SIZES[ggml_type]
        name = f"{ggml_type.name}.weight"
        raws[name] = rng.integers(0, 256, (2, size * (3 if elements == 1 else 1)), dtype=np.uint8)
        writer.add_tensor(name, raws[name], raw_dtype=gguf.GGMLQuantizationType(ggml_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return raws


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample.gguf"
    write_sample(path)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    write_sample(tmp_path / "model.gguf", split_max_tensors=10)
    paths = [tmp_path / f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert all(path.exists() for path in paths)
    return paths


def metadata_of(**values: object) -> Metadata:
    return Metadata(Path("m.gguf"), values)  # pyright: ignore[reportArgumentType]


# Whole files


def test_every_type_of_metadata_arrives_as_written(sample: Path) -> None:
    metadata = GGUFFile.open(sample).metadata
    for key, (value, _) in SCALARS.items():
        assert metadata[key] == value
        assert type(metadata[key]) is type(value)
    for key, (values, _, dtype) in ARRAYS.items():
        found = metadata[key]
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, np.array(values, dtype), strict=True)
        assert not found.flags.writeable
    assert metadata["b.str"] == STRINGS
    nested = metadata["b.nested"]
    assert isinstance(nested, list)
    assert [list(inner) for inner in nested] == [[1, 2], [3]]
    assert metadata["b.nested_str"] == [["x", "yz"], ["語"]]
    assert "a.u8" in metadata
    assert "a.none" not in metadata
    assert set(metadata) == {*SCALARS, *ARRAYS, "general.architecture", "b.str", "b.nested", "b.nested_str"}


@pytest.mark.parametrize("alignment", [None, 32, 64, 4096])
def test_every_tensor_arrives_as_written(tmp_path: Path, alignment: int | None) -> None:
    raws = write_sample(tmp_path / "m.gguf", alignment=alignment)
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        assert list(file.tensors) == list(raws)
        for name, tensor in file.tensors.items():
            assert tensor.name == name == f"{tensor.type.name}.weight"
            np.testing.assert_array_equal(tensor.data, raws[name], strict=True)
            elements, size = BLOCK_SIZES[tensor.type]
            assert tensor.shape == (2, raws[name].shape[1] // size * elements)
            assert tensor.nbytes == raws[name].nbytes
            assert not tensor.data.flags.writeable


def test_a_file_is_a_checkpoint_and_its_tensors_decode_themselves(tmp_path: Path) -> None:
    raws = write_sample(tmp_path / "m.gguf")
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        checkpoint: Checkpoint = file
        for name, tensor in checkpoint.tensors.items():
            assert name == f"{tensor.type_name}.weight"
            assert tensor.permutation is None
            exact = reference(raws[name], GGMLType[tensor.type_name])
            for rows in (slice(None), slice(1, 2), np.array([1, 0, 1])):
                np.testing.assert_array_equal(tensor.dequantize(rows), exact[rows], strict=True)
                if tensor.format is not None:
                    codes = tensor.decode(rows)
                    assert codes.format == tensor.format
                    np.testing.assert_array_equal(codes.values(), exact[rows], strict=True)
            assert (tensor.format is None) == (tensor.type_name in {"F32", "F16", "BF16"})


def test_shapes_are_outermost_first_and_rows_are_flattened(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    experts = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    writer.add_tensor("experts", experts)
    writer.add_tensor("norm", experts[0, 0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = GGUFFile.open(tmp_path / "m.gguf").tensors
    assert (tensors["experts"].shape, tensors["experts"].data.shape) == ((2, 3, 4), (6, 16))
    assert (tensors["norm"].shape, tensors["norm"].data.shape) == ((4,), (1, 16))
    np.testing.assert_array_equal(tensors["experts"].data.view("<f4"), experts.reshape(6, 4))


def test_views_and_metadata_outlive_close(sample: Path) -> None:
    with GGUFFile.open(sample) as file:
        data = file.tensors["Q4_0.weight"].data
    assert file.tensors == {}
    assert data.sum() > 0
    assert file.metadata.get_strings("b.str") == STRINGS


def test_a_symlink_is_as_good_as_the_file(sample: Path) -> None:
    link = sample.with_name("link.gguf")
    link.symlink_to(sample)
    assert GGUFFile.open(str(link)).metadata.get_str("general.architecture") == "llama"


@given(
    strings=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1),
    floats=st.lists(st.floats(width=32, allow_nan=False), min_size=1),
)
def test_any_strings_and_floats_survive(tmp_path_factory: pytest.TempPathFactory, strings, floats) -> None:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("strings", strings)
    writer.add_key_value("floats", floats, V.ARRAY, sub_type=V.FLOAT32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = GGUFFile.open(path).metadata
    assert metadata["strings"] == strings
    np.testing.assert_array_equal(metadata["floats"], np.array(floats, np.float32), strict=True)


# Paths that are no model


def test_a_path_without_a_file_is_not_found(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    for path in (tmp_path / "none.gguf", tmp_path, pipe, tmp_path / "nul\0.gguf"):
        with pytest.raises(ModelNotFoundError) as caught:
            GGUFFile.open(path)
        assert caught.value.value == str(path)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(WeightFileError, match=r"empty\.gguf: magic: the file is empty"):
        GGUFFile.open(tmp_path / "empty.gguf")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("strings", STRINGS)
    writer.add_array("floats", [1.0, 2.0])
    writer.add_tensor("q", np.ones((2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("f", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    last = GGUFFile.open(path).tensors["f"].data.tobytes()
    end = path.read_bytes().rindex(last) + len(last)  # what follows is padding
    os.truncate(path, end)
    assert len(GGUFFile.open(path).tensors) == 2
    for size in reversed(range(end)):
        os.truncate(path, size)
        with pytest.raises(WeightFileError) as caught:
            GGUFFile.open(path)
        assert "cut.gguf" in caught.value.field


# Checked access to metadata


@pytest.mark.parametrize("wrong", [True, 1.0, "1", np.array([1]), -1, 101], ids=repr)
def test_get_int_takes_an_integer_in_its_range_and_nothing_else(wrong: object) -> None:
    assert metadata_of(k=100).get_int("k", minimum=0, maximum=100) == 100
    with pytest.raises(WeightFileError, match=r"m\.gguf: metadata 'k': must be an integer in \[0, 100\], got"):
        metadata_of(k=wrong).get_int("k", minimum=0, maximum=100)


@pytest.mark.parametrize("wrong", [True, 1, "1", float("nan"), float("inf"), 0.0, 2.5], ids=repr)
def test_get_float_takes_a_finite_float_in_its_range_and_nothing_else(wrong: object) -> None:
    assert metadata_of(k=2.0).get_float("k", above=0.0, maximum=2.0) == 2.0
    with pytest.raises(WeightFileError, match=r"must be a finite float in \(0.0, 2.0\], got"):
        metadata_of(k=wrong).get_float("k", above=0.0, maximum=2.0)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")], ids=repr)
def test_get_float_without_limits_still_wants_a_finite_number(wrong: float) -> None:
    assert metadata_of(k=-1e30).get_float("k") == -1e30
    with pytest.raises(WeightFileError, match="must be a finite float"):
        metadata_of(k=wrong).get_float("k")


@pytest.mark.parametrize(
    ("getter", "good", "wrong"),
    [
        (Metadata.get_bool, True, 1),
        (Metadata.get_str, "x", 1),
        (Metadata.get_strings, ["x"], "x"),
        (Metadata.get_strings, [], np.zeros(0)),
        (Metadata.get_strings, ["x"], [["x"]]),
        (Metadata.get_ints, np.array([1], np.uint8), np.array([1.0])),
        (Metadata.get_ints, np.array([1], np.uint64), np.array([2**31], np.uint64)),
        (Metadata.get_ints, np.array([-1]), np.array([True])),
        (Metadata.get_floats, np.array([1.0], np.float32), np.array([np.nan])),
        (Metadata.get_floats, np.array([1.0]), np.array([1])),
    ],
)
def test_getters_check_the_type(getter, good: object, wrong: object) -> None:
    np.testing.assert_array_equal(getter(metadata_of(k=good), "k"), good)
    with pytest.raises(WeightFileError, match=r"metadata 'k': must be a"):
        getter(metadata_of(k=wrong), "k")
    with pytest.raises(WeightFileError, match=r"metadata 'k': is missing; expected a"):
        getter(metadata_of(), "k")


def test_arrays_of_another_length_are_refused() -> None:
    metadata = metadata_of(ints=np.arange(3), floats=np.zeros(3))
    assert metadata.get_ints("ints", length=3).dtype == np.int64
    assert metadata.get_floats("floats", length=3).dtype == np.float64
    for getter, key in ((metadata.get_ints, "ints"), (metadata.get_floats, "floats")):
        with pytest.raises(WeightFileError, match=r"must be an array of 4 .*, got 'array of 3 "):
            getter(key, length=4)


def test_a_default_stands_in_for_a_missing_key_only() -> None:
    assert metadata_of().get_int("k", None) is None
    assert metadata_of().get_float("k", 1e-5) == 1e-5
    assert metadata_of().get_str("k", "x") == "x"
    assert metadata_of().get_bool("k", True) is True
    with pytest.raises(WeightFileError, match="must be an integer"):
        metadata_of(k="x").get_int("k", None)


def test_a_setting_per_layer_may_be_one_number() -> None:
    assert metadata_of(k=2).get_int_per_layer("k", layers=3) == [2, 2, 2]
    assert metadata_of(k=np.array([1, 2, 3], np.uint32)).get_int_per_layer("k", layers=3) == [1, 2, 3]
    assert metadata_of().get_int_per_layer("k", 4, layers=2) == [4, 4]
    for wrong in (np.array([1, 2]), np.array([1, 2, 0]), np.array([1.0, 2.0, 3.0]), 0, True):
        with pytest.raises(WeightFileError, match=r"must be an integer in \[1, 2147483647\] or an array of 3 of them"):
            metadata_of(k=wrong).get_int_per_layer("k", layers=3, minimum=1)
    with pytest.raises(WeightFileError, match="is missing"):
        metadata_of().get_int_per_layer("k", layers=3)


# Shards


def test_any_shard_opens_the_whole_model(shards: list[Path], tmp_path: Path) -> None:
    raws = write_sample(tmp_path / "whole.gguf")
    for path in shards:
        file = GGUFFile.open(path)
        assert file.path == path
        assert list(file.tensors) == list(raws)
        for name, raw in raws.items():
            np.testing.assert_array_equal(file.tensors[name].data, raw)
        assert file.metadata.get_strings("b.str") == STRINGS  # only the first shard has it


def test_a_first_shard_may_hold_metadata_alone(tmp_path: Path) -> None:
    write_sample(tmp_path / "m.gguf", split_max_tensors=len(WRITABLE), small_first_shard=True)
    assert len(GGUFFile.open(tmp_path / "m-00001-of-00002.gguf").tensors) == len(WRITABLE)


def test_a_missing_shard_is_named(shards: list[Path]) -> None:
    shards[1].unlink()
    with pytest.raises(ModelNotFoundError, match=r"1 are missing, the first is model-00002-of-00003\.gguf"):
        GGUFFile.open(shards[0])


def test_a_shard_under_another_name_is_refused(shards: list[Path]) -> None:
    renamed = shards[0].rename(shards[0].with_name("model.gguf"))
    with pytest.raises(WeightFileError, match=r"'split\.count': the file is one of 3 shards"):
        GGUFFile.open(renamed)


def test_shards_out_of_order_are_refused(shards: list[Path]) -> None:
    shards[2].write_bytes(shards[1].read_bytes())
    with pytest.raises(WeightFileError, match=r"00003\.gguf: metadata 'split\.no': must be 2: .*, got 1"):
        GGUFFile.open(shards[0])


def test_a_damaged_sibling_is_named(shards: list[Path]) -> None:
    shards[2].write_bytes(shards[2].read_bytes()[:100])
    with pytest.raises(WeightFileError, match=r"model-00003-of-00003\.gguf: "):
        GGUFFile.open(shards[0])


# Types


def write_one_block(path: Path, ggml_type: GGMLType) -> None:
    """A file of one block of zeros, by hand: the package writes no type that it does not know."""
    elements, size = BLOCK_SIZES[ggml_type]
    info = (4).to_bytes(8, "little") + b"name" + np.array([1], "<u4").tobytes()
    info += np.array([elements], "<u8").tobytes() + np.array([ggml_type], "<u4").tobytes() + bytes(8)
    path.write_bytes(b"GGUF" + np.array([3, 1, 0, 0, 0], "<u4").tobytes() + info + bytes(7 + size))


@pytest.mark.parametrize("ggml_type", sorted(SUPPORTED_TYPES), ids=lambda t: t.name)
def test_a_tensor_of_every_type_with_a_decoder_opens(tmp_path: Path, ggml_type: GGMLType) -> None:
    write_one_block(tmp_path / "m.gguf", ggml_type)
    tensor = GGUFFile.open(tmp_path / "m.gguf").tensors["name"]
    assert (tensor.type, tensor.shape, tensor.nbytes) == (
        ggml_type,
        (BLOCK_SIZES[ggml_type].elements,),
        BLOCK_SIZES[ggml_type].bytes,
    )


@pytest.mark.parametrize("ggml_type", sorted(set(GGMLType) - SUPPORTED_TYPES), ids=lambda t: t.name)
def test_a_known_type_without_decoder_is_unsupported_not_damaged(tmp_path: Path, ggml_type: GGMLType) -> None:
    path = tmp_path / "m.gguf"
    write_one_block(path, ggml_type)
    expected = rf"m\.gguf: tensor 'name' type: .*Q4_0, .*, got '{ggml_type.name}'"
    with pytest.raises(UnsupportedModelError, match=expected):
        GGUFFile.open(path)


# Mutated files (reliability.md, test 6)


def fuzz(sample: Path, files: int) -> None:
    command = [sys.executable, str(FUZZ), str(sample), str(files)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # finds the package, installed or not
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    loaded, refused = map(int, done.stdout.split())
    assert loaded + refused == files
    assert min(loaded, refused) > files // 20  # the mutations reach both ends


def test_mutated_files_are_refused_or_load_within_limits(sample: Path) -> None:
    fuzz(sample, 3_000)


@pytest.mark.slow
def test_many_mutated_files_are_refused_or_load_within_limits(sample: Path) -> None:
    fuzz(sample, 100_000)
