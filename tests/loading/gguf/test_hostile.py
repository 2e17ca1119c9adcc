"""The GGUF reader on files crafted byte by byte to break it (reliability.md, tests 4 and 5)."""

import struct
import sys
import tracemalloc
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from atoma_jax.errors import WeightFileError
from atoma_jax.loading.gguf.file import GGUFFile

U8, U16, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 2, 4, 6, 7, 8, 9, 10
HUGE = 2**64 - 1
Q8_0 = 8


def text(value: str | bytes) -> bytes:
    encoded = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(encoded)) + encoded


def kv(key: str | bytes, type_id: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", type_id) + payload


def u32(key: str, value: int) -> bytes:
    return kv(key, U32, struct.pack("<I", value))


def array(type_id: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", type_id, count) + payload


def tensor(
    name: str | bytes = "t", dims: tuple[int, ...] = (8,), type_id: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    n_dims = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", n_dims, *dims, type_id, offset)


def build(
    *entries: bytes,
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    n_kv: int | None = None,
    n_tensors: int | None = None,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A file whose counts may lie."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(entries) if n_kv is None else n_kv)
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data


def nested(depth: int) -> bytes:
    return array(ARRAY, 1, nested(depth - 1)) if depth > 1 else array(U8, 1, b"\x01")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hostile.gguf"


def refusal(path: Path, content: bytes) -> str:
    """The message with which a file is refused; it names the file first."""
    path.write_bytes(content)
    with pytest.raises(WeightFileError) as caught:
        GGUFFile.open(path)
    assert caught.value.field.startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_the_builder_builds_files_that_load(path: Path) -> None:
    entries = (kv("k", ARRAY, nested(4)), kv("empty", ARRAY, array(STRING, 0)), u32("general.alignment", 64))
    tensors = (tensor("a"), tensor("b", (32, 2), Q8_0, 64), tensor("scalar", (), 0, 192))
    path.write_bytes(build(*entries, tensors=tensors, data=bytes(196), alignment=64, version=2))
    file = GGUFFile.open(path)
    assert [t.shape for t in file.tensors.values()] == [(8,), (2, 32), ()]
    assert file.tensors["scalar"].data.shape == (1, 4)
    assert file.metadata["empty"] == []
    path.write_bytes(build())
    assert len(GGUFFile.open(path).tensors) == 0


# Test 4: counts of 2^64 − 1

HUGE_COUNTS = {
    "n_kv": build(n_kv=HUGE),
    "n_tensors": build(n_tensors=HUGE),
    "metadata key 0 of 1 length": build(struct.pack("<Q", HUGE)),
    "metadata 'k': needs bytes": build(kv("k", STRING, struct.pack("<Q", HUGE))),
    "tensor 0 of 1 name length": build(tensors=(struct.pack("<Q", HUGE),), data=bytes(64)),
    "tensor 't' n_dims": build(tensors=(text("t") + b"\xff" * 4,), data=bytes(64)),
    "tensor 't' dims": build(tensors=(tensor(dims=(HUGE,)),)),
    "tensor 't' offset": build(tensors=(tensor(offset=HUGE - 31),), data=bytes(64)),
    "metadata 'k'[1] or the string before it": build(kv("k", ARRAY, array(STRING, 2, struct.pack("<QQ", HUGE, HUGE)))),
    "metadata 'k': needs": build(kv("k", ARRAY, array(STRING, 2, text("a") + struct.pack("<Q", 2**63 - 1)))),
    "metadata 'k'[0] array length": build(kv("k", ARRAY, array(ARRAY, 1, array(U8, HUGE)))),
} | {
    f"metadata 'k' array length ({type_id})": build(kv("k", ARRAY, array(type_id, HUGE, bytes(64))))
    for type_id in range(13)
}


@pytest.mark.parametrize("field", HUGE_COUNTS)
def test_a_huge_count_costs_neither_memory_nor_steps(path: Path, field: str) -> None:
    path.write_bytes(HUGE_COUNTS[field] + bytes(1 << 16))  # room for a naïve reader to start
    calls = 0

    def count_calls(frame: FrameType, event: str, arg: object) -> None:
        nonlocal calls
        calls += 1

    tracemalloc.start()
    sys.setprofile(count_calls)
    try:
        with pytest.raises(WeightFileError) as caught:
            GGUFFile.open(path)
    finally:
        sys.setprofile(None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert field.partition(" (")[0] in str(caught.value)
    assert peak < 1 << 20
    assert calls < 20_000  # a few milliseconds


# Test 5: everything that contradicts the format

BROKEN = {
    # identity
    "magic: must be b'GGUF'; this is no GGUF file, got b'GGML'": b"GGML" + bytes(60),
    "version: must be one of (2, 3); convert the model anew, got 1": build(version=1),
    "version: the file is big-endian; convert it to little-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64),
    # keys and values
    "metadata key 1 of 2: is a duplicate; every key may appear once, got 'k'": build(u32("k", 1), u32("k", 1)),
    "metadata key 0 of 1 length: must be in [1, 65535], got 0": build(u32("", 1)),
    "metadata key 0 of 1 length: must be in [1, 65535], got 65536": build(u32("k" * 65536, 1)),
    "metadata key 0 of 1: must be UTF-8; the file is damaged, got b'\\xff'": build(kv(b"\xff", U8, b"\0")),
    "metadata 'k' type: must be a value type of GGUF, 0 to 12, got 13": build(kv("k", 13, bytes(8))),
    "metadata 'k': must be a bool, a byte of 0 or 1, got 2": build(kv("k", BOOL, b"\x02")),
    "metadata 'k': must be UTF-8": build(kv("k", STRING, text(b"\xed\xa0\x80"))),  # a lone surrogate
    "metadata 'k' array type: must be a value type of GGUF, 0 to 12, got 77": build(kv("k", ARRAY, array(77, 1))),
    "metadata 'k': must be an array of bools": build(kv("k", ARRAY, array(BOOL, 3, b"\0\1\2"))),
    "metadata 'k'[0][0][0]: arrays may nest at most 4 deep, got 5": build(kv("k", ARRAY, nested(5))),
    "metadata 'k'[0][0][0]: arrays may nest at most 4 deep": build(kv("k", ARRAY, nested(400))),
    "metadata 'k': a file may hold at most 65536 arrays inside arrays, got 65537": build(
        kv("k", ARRAY, array(ARRAY, 65537, array(U8, 0) * 65537))
    ),
    "n_kv: must be at most 65536, got 65537": build(n_kv=65537, data=bytes(1 << 20)),
    "n_tensors: must be at most 262144, got 262145": build(n_tensors=262145, data=bytes(1 << 23)),
    # alignment
    **{
        f"metadata 'general.alignment': must be an integer in [8, 1048576], got {value}.": build(
            u32("general.alignment", value)
        )
        for value in (0, 4, 2**31)
    },
    "metadata 'general.alignment': must be a power of two, got 48": build(u32("general.alignment", 48)),
    "metadata 'general.alignment': must be an integer in [8, 1048576], got '32'": build(
        kv("general.alignment", STRING, text("32"))
    ),
    # tensors
    "tensor 1 of 2 name: is a duplicate; every tensor may appear once, got 't'": build(
        tensors=(tensor(), tensor(offset=32)), data=bytes(64)
    ),
    "tensor 0 of 1 name length: must be in [1, 64], got 65": build(tensors=(tensor("t" * 65),), data=bytes(64)),
    "tensor 0 of 1 name length: must be in [1, 64], got 0": build(tensors=(tensor(""),), data=bytes(64)),
    "tensor 't' n_dims: must be at most 4, got 5": build(tensors=(tensor(dims=(1,) * 5),), data=bytes(64)),
    "tensor 't' dims: must all be at least 1, got (8, 0)": build(tensors=(tensor(dims=(8, 0)),), data=bytes(64)),
    "tensor 't' dims: must have a product below 2^63, got (4294967296, 2147483648)": build(
        tensors=(tensor(dims=(2**32, 2**31)),), data=bytes(64)
    ),
    # a product that wraps to 32 in 64 bits
    "tensor 't' dims: must have a product below 2^63, got (4294967296, 4294967296, 32)": build(
        tensors=(tensor(dims=(2**32, 2**32, 32)),), data=bytes(64)
    ),
    # elements fit into 63 bits, their bytes do not
    "tensor 't' offset: needs 36893488147419103200 bytes from byte 64 on and the file ends at byte 128": build(
        tensors=(tensor(dims=(2**63 - 8,)),), data=bytes(64)
    ),
    "tensor 't' type: is no tensor type of ggml: the file is damaged, or newer than this program, got 4": build(
        tensors=(tensor(type_id=4),), data=bytes(64)
    ),
    "tensor 't' type: is no tensor type of ggml: the file is damaged, or newer than this program, got 42949": build(
        tensors=(tensor(type_id=2**32 - 1),), data=bytes(64)
    ),
    "tensor 't' dims[0]: must be a multiple of 32, the block size of Q8_0, got 33": build(
        tensors=(tensor(dims=(33,), type_id=Q8_0),), data=bytes(64)
    ),
    "tensor 't' offset: must be a multiple of the alignment 32, got 4": build(
        tensors=(tensor(offset=4),), data=bytes(64)
    ),
    "tensor 't' offset: needs 32 bytes from byte 128 on and the file ends at byte 128": build(
        tensors=(tensor(offset=64),), data=bytes(64)
    ),
    "tensor 'b' offset: overlaps tensor 'a', which ends at byte 160 of the file, got 'byte 128 of the file'": build(
        tensors=(tensor("a", (16,)), tensor("b", offset=32)), data=bytes(64)
    ),
    "tensor 'b' offset: overlaps tensor 'a'": build(tensors=(tensor("a"), tensor("b")), data=bytes(64)),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_file_is_refused_with_field_value_and_limit(path: Path, message: str) -> None:
    assert message in refusal(path, BROKEN[message])


def test_a_string_of_a_vocabulary_that_is_not_utf8_is_named_when_it_is_read(path: Path) -> None:
    tokens = kv("tokens", ARRAY, array(STRING, 3, text("a") + text(b"\xc3") + text(b"\xa9")))
    path.write_bytes(build(u32("first", 1), tokens))  # tests check the types of arguments, so of the first value
    metadata = GGUFFile.open(path).metadata  # a plan of memory needs no tokens
    with pytest.raises(WeightFileError, match=r"hostile\.gguf: metadata 'tokens'\[1\]: must be UTF-8.*, got b'\\xc3'"):
        metadata.get_strings("tokens")


def test_a_long_value_is_cut_in_the_message(path: Path) -> None:
    assert len(refusal(path, build(kv("k", STRING, text(b"\xff" * 100_000))))) < 400


def test_data_that_ends_with_the_file_is_in_bounds(path: Path) -> None:
    path.write_bytes(build(tensors=(tensor(offset=32),), data=bytes(32) + np.arange(8, dtype="<f4").tobytes()))
    np.testing.assert_array_equal(GGUFFile.open(path).tensors["t"].data.view("<f4")[0], np.arange(8))


def test_a_hole_between_tensors_is_allowed(path: Path) -> None:
    path.write_bytes(build(tensors=(tensor("b", offset=96), tensor("a")), data=bytes(128)))
    assert list(GGUFFile.open(path).tensors) == ["b", "a"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (("t",), ("t",), r"m-00002-of-00002\.gguf: tensor name: is in another shard as well, got 't'"),
        (("t",), (), r"m-00001-of-00002\.gguf: metadata 'split\.tensors\.count': must be 1: .*, got 2"),
    ],
)
def test_shards_that_contradict_each_other_are_refused(tmp_path: Path, first, second, message: str) -> None:
    for number, names in enumerate((first, second)):
        entries = [
            kv("split.no", U16, struct.pack("<H", number)),
            kv("split.count", U16, struct.pack("<H", 2)),
            u32("split.tensors.count", 2),
        ]
        content = build(*entries, tensors=tuple(tensor(name) for name in names), data=bytes(32))
        (tmp_path / f"m-0000{number + 1}-of-00002.gguf").write_bytes(content)
    with pytest.raises(WeightFileError, match=message):
        GGUFFile.open(tmp_path / "m-00001-of-00002.gguf")
