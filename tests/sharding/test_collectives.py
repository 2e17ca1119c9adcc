"""No communication is in a compiled step but what a committed list has, and no more of it."""

import json
from pathlib import Path

import pytest

from atoma_jax.engine.buckets import Program
from bench.collectives import differences
from tests.sharding.programs import DECODE, LIST, PROGRAMS, exchanged, write_model

LISTED = json.loads(LIST.read_text(encoding="utf-8"))
QUICK = (("fsdp=2,tensor=2", DECODE),)  # it has every kind
EVERY = [(mesh, program) for mesh, programs in PROGRAMS.items() for program in programs]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("mesh", "program"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY],
    ids=str,
)
def test_a_step_exchanges_what_is_listed(mesh: str, program: Program, path: Path) -> None:
    (found,) = exchanged(path, mesh, (program,)).values()
    assert differences(found, LISTED[mesh][str(program)]) == []
    assert (found == []) == (mesh == "data=2"), "slices of data have nothing to say to each other"
