"""No communication is in a compiled step but what a committed list has, and no more of it."""

import json
from pathlib import Path

import pytest

from atoma_jax.engine.buckets import Program
from bench.collectives import differences
from tests.sharding.programs import DECODE, LIST, MESHES, MIXED, SCORE, exchanged, write_model

LISTED = json.loads(LIST.read_text(encoding="utf-8"))
# Mixed steps and scores exchange what decodes do, of other sizes.
OTHERS = [
    pytest.param(mesh, (MIXED, SCORE), marks=() if mesh == "fsdp=2,tensor=2" else pytest.mark.slow) for mesh in MESHES
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return write_model(tmp_path_factory.mktemp("tiny"))


def test_every_mesh_is_listed() -> None:
    assert {mesh: set(programs) for mesh, programs in LISTED.items()} == {
        mesh: {"decode-4x4", "mixed-32x4", "score-16x4"} for mesh in MESHES
    }
    assert LISTED["data=2"] == {"decode-4x4": [], "mixed-32x4": [], "score-16x4": []}


@pytest.mark.parametrize(("mesh", "programs"), [*((mesh, (DECODE,)) for mesh in MESHES), *OTHERS])
def test_a_step_exchanges_what_is_listed(mesh: str, programs: tuple[Program, ...], path: Path) -> None:
    for name, found in exchanged(path, mesh, programs).items():
        assert differences(found, LISTED[mesh][name]) == []
