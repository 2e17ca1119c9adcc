"""The safetensors reader on files that the format's own library wrote: single, sharded, missing, mutated.

Crafted files are test_safetensors_hostile.py's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from atoma_jax.errors import ModelNotFoundError, WeightFileError
from atoma_jax.loading.hf.safetensors import DTYPES, open_file, open_weights

FUZZ = Path(__file__).with_name("safetensors_fuzz.py")
INDEX = "model.safetensors.index.json"


def sample() -> dict[str, np.ndarray]:
    """A tensor of every dtype that can be read, scalars, empty ones and odd names."""
    rng = np.random.default_rng(0)
    floats = rng.standard_normal((3, 5))
    return {
        "F32": floats.astype(np.float32),
        "F16": floats.astype(np.float16),
        "BF16": floats.astype(ml_dtypes.bfloat16),
        "F8_E4M3": floats.astype(ml_dtypes.float8_e4m3fn),
        "I8": rng.integers(-128, 128, (2, 3, 4), np.int8),
        "U8": rng.integers(0, 256, 7, np.uint8),
        "I16": rng.integers(-(2**15), 2**15, (4,), np.int16),
        "I32": rng.integers(-(2**31), 2**31, (2, 2), np.int32),
        "I64": rng.integers(-(2**63), 2**63 - 1, (2,), np.int64),
        "BOOL": np.array([True, False]),
        "scalar": np.array(1.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        'Ġ語 🦙 "\\\n': np.arange(3, dtype=np.float32),
    }


def write_shards(folder: Path, tensors: dict[str, np.ndarray], count: int = 3) -> dict[str, object]:
    """Writes shards and their index, which is returned."""
    names = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    places = {name: names[number % count] for number, name in enumerate(tensors)}
    for file in names:
        safetensors.numpy.save_file({name: tensors[name] for name in places if places[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1234, "total_parameters": 1.5}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
    return index


def test_every_tensor_arrives_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = sample()
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt", "quoted": '"{}\\'})
    found = open_file(path)
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    assert found.keys() == theirs.keys() == tensors.keys()
    for name, tensor in found.items():
        assert tensor.name == name
        assert tensor.dtype == theirs[name]["dtype"]
        assert list(tensor.shape) == theirs[name]["shape"]
        assert tensor.data.tobytes() == bytes(theirs[name]["data"]) == tensors[name].tobytes()
        assert not tensor.data.flags.writeable
    assert {tensor.dtype for tensor in found.values()} == set(DTYPES)


def test_data_need_not_be_aligned(tmp_path: Path) -> None:
    header = b'{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    for blanks in range(8):
        path = tmp_path / f"{blanks}.safetensors"
        text = header + b" " * blanks
        path.write_bytes(len(text).to_bytes(8, "little") + text + np.array([1.5, -2], "<f4").tobytes())
        np.testing.assert_array_equal(open_file(path)["t"].data, [1.5, -2])


def test_a_folder_is_read_from_its_single_file_whatever_its_name(tmp_path: Path) -> None:
    safetensors.numpy.save_file(sample(), tmp_path / "weights.safetensors")
    assert open_weights(tmp_path).keys() == sample().keys()


def test_a_folder_is_read_from_all_its_shards(tmp_path: Path) -> None:
    tensors = sample()
    write_shards(tmp_path, tensors)
    found = open_weights(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert tensor.data.tobytes() == tensors[name].tobytes()
    assert len({tensor.path for tensor in found.values()}) == 3


def test_one_whole_file_goes_before_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path, sample())
    safetensors.numpy.save_file({"whole": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    assert open_weights(tmp_path).keys() == {"whole"}


# What is not there


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, sample())
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"3 shards .* 1 are missing, the first is model-00002-of-00003"):
        open_weights(tmp_path)


def test_a_folder_of_pickled_weights_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ModelNotFoundError, match=r"pytorch_model\.bin is pickled code and never read: convert it"):
        open_weights(tmp_path)


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"model\.safetensors, model\.safetensors\.index\.json"):
        open_weights(tmp_path)
    with pytest.raises(ModelNotFoundError, match="the folder cannot be read"):
        open_weights(tmp_path / "none")


def test_several_files_without_an_index_are_not_guessed_at(tmp_path: Path) -> None:
    for name in ("a", "b"):
        safetensors.numpy.save_file(sample(), tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"has 2 \*\.safetensors files and no model\.safetensors\.index\.json"):
        open_weights(tmp_path)


# Index and shards that contradict each other


def test_an_index_that_misplaces_a_tensor_is_refused(tmp_path: Path) -> None:
    index = write_shards(tmp_path, sample())
    places = index["weight_map"]
    assert isinstance(places, dict)
    places["F32"], places["F16"] = places["F16"], places["F32"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        WeightFileError, match=r"tensor 'F32': is in model-00001\S+, where \S+ does not place it, got 'mo"
    ):
        open_weights(tmp_path)


def test_a_tensor_that_the_index_does_not_know_is_refused(tmp_path: Path) -> None:
    index = write_shards(tmp_path, sample())
    places = index["weight_map"]
    assert isinstance(places, dict)
    del places["U8"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightFileError, match=r"tensor 'U8': is in model-\S+, where \S+ does not place it, got None"):
        open_weights(tmp_path)


def test_a_tensor_that_no_shard_holds_is_refused(tmp_path: Path) -> None:
    index = write_shards(tmp_path, sample())
    places = index["weight_map"]
    assert isinstance(places, dict)
    places["none"] = places["U8"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightFileError, match=r"index\.json: weight_map: places a tensor .* not there, got 'none'"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "", "..", "a\0b"]
)
def test_a_shard_outside_of_the_folder_is_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"t": file}}))
    with pytest.raises(
        WeightFileError, match=r"weight_map 't': must be the name of a \.safetensors file beside the index"
    ):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "must be a key of an index"),
        ('{"weight_map":{}}', "weight_map: is missing or empty"),
        ('{"metadata":{"total_size":1}}', "weight_map: is missing or empty"),
        ('{"weight_map":{"t":"a.safetensors","t":"a.safetensors"}}', "weight_map 't': is a duplicate"),
        ('{"weight_map":{"t":"a.safetensors"},"weight_map":{"t":"a.safetensors"}}', "weight_map: is a duplicate"),
        ('{"weight_map":{"t":["a"]}}', "header byte 15: must be a tensor's name and that of its file"),
        ('{"metadata":{"a":{"b":1}}}', "header byte 13: must be a name and a plain value of 'metadata'"),
        ("[" * 1_000_000, "must be '{', the start of an index"),
        ('{"weight_map":' + '{"t":' * 1_000_000, "must be a tensor's name and that of its file"),
        ('{"weight_map":{"t":"a.safetensors"}} {}', "must be the end of the index"),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(WeightFileError) as caught:
        open_weights(tmp_path)
    assert message in str(caught.value)
    assert caught.value.field.startswith(str(tmp_path / INDEX))


# Damage


def run_fuzz(tmp_path: Path, count: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(FUZZ), str(tmp_path), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded, refused = map(int, done.stdout.split())
    assert loaded + refused == count
    assert min(loaded, refused) > count // 25  # the mutations reach both ends


def test_mutated_folders_load_or_are_refused(tmp_path: Path) -> None:
    run_fuzz(tmp_path, 2000)


@pytest.mark.slow
def test_100_000_mutated_folders_load_or_are_refused(tmp_path: Path) -> None:
    run_fuzz(tmp_path, 100_000)
