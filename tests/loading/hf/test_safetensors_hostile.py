"""The safetensors reader on headers crafted byte by byte to break it (reliability.md, test 7)."""

import json
import sys
import tracemalloc
from pathlib import Path
from types import FrameType

import pytest

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.hf import safetensors
from atoma_jax.loading.hf.safetensors import MAX_HEADER, open_file

HUGE = 2**64 - 1
ENTRY = '"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def build(header: str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file whose header length may lie."""
    text = header.encode() if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(name: str = "t", dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> str:
    return f"{json.dumps(name)}:" + json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


def header(*entries: str) -> str:
    return "{" + ",".join(entries) + "}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hostile.safetensors"


def test_the_builder_builds_files_that_load(path: Path) -> None:
    metadata = '"__metadata__":{"a":"b", "c":"{\\"nested\\":[1]}"}'
    spaced = ' "b" :\n{ "shape" : [ 1 , 3 ] ,\t"data_offsets":[ 8 , 20 ] , "dtype" : "F32" } '
    path.write_bytes(build(header(metadata, ENTRY, spaced) + "   ", bytes(20)))
    assert {name: tensor.shape for name, tensor in open_file(path).items()} == {"t": (2,), "b": (1, 3)}
    for text in ("{}", "{ }  ", '{"__metadata__":{}}'):
        path.write_bytes(build(text))
        assert open_file(path) == {}


# What must be refused before anything is built of it. Each is followed by room for a naïve reader to start.

HUGE_HEADERS = {
    f"header length: must be at most {MAX_HEADER}; no safetensors file, got {HUGE}": build("{}", length=HUGE),
    f"header length: must be at most {MAX_HEADER}; no safetensors file, got 100000001": build("{}", length=10**8 + 1),
    "header length: must fit into the file of": build("{}", length=10**8),
    "header byte 8: must be '{', the start of a header, got b'[[[[": build("[" * 10_000_000),
    "header byte 9: must be a name of at most 1024 characters and an object": build('{"' + "a" * 10_000_000),
    "header byte 14: must be dtype (a string), shape": build('{"t":' * 2_000_000),
    "header byte 28: must be dtype (a string), shape (at most 8 whole numbers) or data_offsets": build(
        '{"t":{"dtype":"F32", "shape":' + "[" * 10_000_000
    ),
    "header byte 28: must be dtype (a string), shape (at most 8 whole": build(
        '{"t":{"dtype":"F32","shape":[' + "1," * 5_000_000
    ),
    "header byte 14: must be dtype": build('{"t":{"shape":[' + "9" * 10_000_000 + "]"),
    "header byte 25: must be a pair of strings of __metadata__": build('{"__metadata__":{' + '"a":{' * 2_000_000),
    "header byte 25: must be a pair": build('{"__metadata__":{"a":"' + "\\" * 10_000_000),
    "header byte 8: must be '{'": build(" " * 10_000_000 + "{}"),
    "tensor 't' shape: must have fewer than 2^63 bytes, got (4294967296, 4294967296)": build(
        header(entry(shape=(2**32, 2**32)))
    ),
    f"tensor 't' shape: must have fewer than 2^63 bytes, got ({HUGE}, 0)": build(header(entry(shape=(HUGE, 0)))),
    "tensor 't' data_offsets: must end within the 65536 bytes of data": build(
        header(entry(shape=(2**60,), offsets=(0, 2**62)))
    ),
}


@pytest.mark.parametrize("message", HUGE_HEADERS)
def test_a_huge_header_costs_neither_memory_nor_steps(path: Path, message: str) -> None:
    path.write_bytes(HUGE_HEADERS[message] + bytes(1 << 16))
    calls = 0

    def count_calls(frame: FrameType, event: str, arg: object) -> None:
        nonlocal calls
        calls += 1

    tracemalloc.start()
    sys.setprofile(count_calls)
    try:
        with pytest.raises(WeightFileError) as caught:
            open_file(path)
    finally:
        sys.setprofile(None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert f"{path}: {message}" in str(caught.value)
    assert len(str(caught.value)) < 600
    assert peak < 1 << 20
    assert calls < 20_000  # a few milliseconds


def test_too_many_tensors_are_refused_at_the_first_one_too_many(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 3)
    empty = [entry(str(n), shape=(0,), offsets=(0, 0)) for n in range(4)]
    path.write_bytes(build(header(*empty[:3])))
    assert len(open_file(path)) == 3
    path.write_bytes(build(header(*empty)))
    with pytest.raises(WeightFileError, match="header: may hold at most 3 tensors, got '3'"):
        open_file(path)


BROKEN = {
    # the frame
    "header length: needs 8 bytes; the file is truncated, got '3 bytes'": b"\0\0\0",
    "header byte 8: must be '{', the start of a header, got b''": build(""),
    "header byte 9: must be a name": build("{"),
    "header byte 10: must be the end of the header, got b'x'": build("{}x"),
    "header byte 61: must be ',' or '}'": build("{" + ENTRY, bytes(8)),
    "header byte 62: must be a name": build("{" + ENTRY + ",}", bytes(8)),
    # names
    "header byte 9: a tensor must have a name, got ''": build(header(entry("")), bytes(8)),
    "header byte 10: must be UTF-8 with valid escapes; the file is damaged, got b'\\xff'": build(
        b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)
    ),
    "header byte 10: must be UTF-8 with valid escapes; the file is damaged, got b'\\xed\\xa0\\x80'": build(
        b'{"\xed\xa0\x80":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)
    ),
    "header byte 10: must be UTF-8 with valid escapes; the file is damaged, got b'\\\\ud800'": build(
        '{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)
    ),
    "header byte 10: must be UTF-8 with valid escapes; the file is damaged, got b'\\\\x'": build(
        '{"\\x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)
    ),
    "header byte 30: must be UTF-8 with valid escapes": build(b'{"__metadata__":{"a":"\xff"}}'),
    "tensor 't': is a duplicate; every tensor may appear once, got 't'": build(header(ENTRY, ENTRY), bytes(8)),
    "tensor 't': is a duplicate": build(header(ENTRY, ENTRY.replace('"t"', '"\\u0074"')), bytes(8)),
    "header: is a duplicate; every key may appear once, got '__metadata__'": build(
        '{"__metadata__":{},"__metadata__":{}}'
    ),
    # objects
    "header byte 14: must be dtype": build('{"t":{}}'),
    "tensor 't' dtype: is missing": build('{"t":{"shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "tensor 't' data_offsets: is missing": build('{"t":{"shape":[2],"dtype":"F32"}}', bytes(8)),
    "tensor 't' shape: is a duplicate": build('{"t":{"shape":[2],"shape":[2]}}'),
    "header byte 14: must be dtype (a string), shape (at most 8 whole numbers) or data_offsets": build(
        '{"t":{"size":[2]}}'
    ),
    # dtypes, shapes, offsets
    "tensor 't' dtype: is no dtype of safetensors: the file is damaged, or newer, got 'F33'": build(
        header(entry(dtype="F33")), bytes(8)
    ),
    "tensor 't' dtype: must be a string, got b'2'": build(
        '{"t":{"dtype":[2],"shape":[2],"data_offsets":[0,8]}}', bytes(8)
    ),
    "tensor 't' shape: must be a list of whole numbers, got b'F32'": build(
        '{"t":{"dtype":"F32","shape":"F32","data_offsets":[0,8]}}', bytes(8)
    ),
    **{
        f"header byte 28: must be dtype (a string), shape (at most 8 whole numbers) or data_offsets {number}": build(
            f'{{"t":{{"dtype":"F32","shape":[{number}],"data_offsets":[0,8]}}}}', bytes(8)
        )
        for number in ("-2", "2.0", "1e1", "02", "true", '"2"', "[2]", "1,,2", "1,", "1,1,1,1,1,1,1,1,2", "9" * 21)
    },
    "tensor 't' data_offsets: must be a begin and an end that is no smaller, got (8, 0)": build(
        header(entry(offsets=(8, 0))), bytes(8)
    ),
    "tensor 't' data_offsets: must be a begin and an end that is no smaller, got (0,)": build(
        header(entry(offsets=(0,))), bytes(8)
    ),
    "tensor 't' data_offsets: must be a begin and an end that is no smaller, got (0, 8, 8)": build(
        header(entry(offsets=(0, 8, 8))), bytes(8)
    ),
    "tensor 't' data_offsets: must span 12 bytes, which is what F32 of shape [3] takes, got (0, 8)": build(
        header(entry(shape=(3,))), bytes(8)
    ),
    "tensor 't' data_offsets: must span 4 bytes, which is what F32 of shape [] takes, got (0, 8)": build(
        header(entry(shape=())), bytes(8)
    ),
    # the layout of the data
    "tensor 't' data_offsets: must end within the 4 bytes of data; the file is truncated, got (0, 8)": build(
        header(ENTRY), bytes(4)
    ),
    "tensor 'b' data_offsets: overlaps tensor 't', which ends at 8, got (4, 12)": build(
        header(ENTRY, entry("b", offsets=(4, 12))), bytes(12)
    ),
    "tensor 't' data_offsets: overlaps tensor 'a', which ends at 8, got (0, 8)": build(
        header(entry("a"), ENTRY), bytes(8)
    ),
    "tensor 'b' data_offsets: leaves a hole behind tensor 't', which ends at 8, got (12, 20)": build(
        header(ENTRY, entry("b", offsets=(12, 20))), bytes(20)
    ),
    "tensor 'b' data_offsets: leaves a hole behind the header, which ends at 0, got (4, 12)": build(
        header(entry("b", offsets=(4, 12))), bytes(12)
    ),
    "data: must end where tensor 't' ends, at byte 8, got '9 bytes'": build(header(ENTRY), bytes(9)),
    "data: must end where the header ends, at byte 0, got '1 bytes'": build("{}", bytes(1)),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_header_is_refused_with_tensor_field_and_value(path: Path, message: str) -> None:
    path.write_bytes(BROKEN[message])
    with pytest.raises(WeightFileError) as caught:
        open_file(path)
    assert caught.value.field.startswith(f"{path}: ")
    assert str(caught.value).startswith(f"{path}: {message.rpartition(' data_offsets ')[0] or message}")


@pytest.mark.parametrize("dtype", ["F64", "F8_E5M2", "F8_E8M0", "F4", "U16", "U32", "U64", "C64"])
def test_a_dtype_without_a_reader_is_refused_by_name(path: Path, dtype: str) -> None:
    path.write_bytes(build(header(entry(dtype=dtype)), bytes(8)))
    with pytest.raises(UnsupportedModelError, match=rf"tensor 't' dtype: .* F32, F16, BF16, .*, got '{dtype}'"):
        open_file(path)


def test_an_empty_file_and_a_folder_are_refused(path: Path) -> None:
    path.write_bytes(b"")
    with pytest.raises(WeightFileError, match="the file is empty"):
        open_file(path)
