"""No communication is in a compiled step but what a committed list has, and no more of it."""

import json
from pathlib import Path

import pytest

from bench.collectives import differences
from tests.sharding.programs import LIST, PROGRAMS, exchanged, write_model

QUICK = ("fsdp=2,tensor=2", "data=2")  # what exchanges all of it, and nothing; the others take a compiler long
LISTED = json.loads(LIST.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    "mesh", [mesh if mesh in QUICK else pytest.param(mesh, marks=pytest.mark.slow) for mesh in PROGRAMS]
)
def test_a_step_exchanges_what_is_listed(mesh: str, path: Path) -> None:
    found = exchanged(path, mesh)
    assert found.keys() == LISTED[mesh].keys()
    for name, lines in found.items():
        assert differences(lines, LISTED[mesh][name]) == []
        assert (lines == []) == (mesh == "data=2"), "slices of data have nothing to say to each other"
