"""Copies of a model have one mark, other weights another, and little is read for it."""

from pathlib import Path

import numpy as np
import pytest

from atoma_jax.loading.content_mark import content_mark


@pytest.fixture
def weights() -> bytes:
    return np.random.default_rng(0).bytes(1 << 20)


def test_a_copy_under_another_name_has_the_same(tmp_path: Path, weights: bytes) -> None:
    one, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    one.write_bytes(weights)
    other.write_bytes(weights)
    assert content_mark(one) == content_mark(other)
    assert len(content_mark(one)) == 16


def test_other_weights_of_the_same_size_and_header_have_another(tmp_path: Path, weights: bytes) -> None:
    one, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    one.write_bytes(weights)
    tuned = np.frombuffer(weights, np.uint8).copy()
    tuned[1 << 16 :] += 1
    other.write_bytes(tuned.tobytes())
    assert content_mark(one) != content_mark(other)


def test_every_part_of_a_split_file_counts(tmp_path: Path, weights: bytes) -> None:
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    first.write_bytes(weights)
    second.write_bytes(b"x")
    before = content_mark(first)
    second.write_bytes(b"y")
    assert content_mark(first) != before


def test_every_file_of_a_folder_counts_and_hidden_ones_do_not(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights" / "0").write_bytes(b"x")
    before = content_mark(tmp_path)
    (tmp_path / ".lock").write_text("")
    assert content_mark(tmp_path) == before
    (tmp_path / "weights" / "0").write_bytes(b"y")
    assert content_mark(tmp_path) != before
