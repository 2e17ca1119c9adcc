"""A model cut over devices says what it says on one: distributions of the next token, of every kind of weight."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from atoma_jax.errors import ConfigError
from atoma_jax.ops import residual, ring
from sharding.mesh import parse_mesh
from tests.sharding.conftest import MODELS
from tests.sharding.steps import log_probabilities, set_up

CLOSE = 1e-3  # in float32, of log-probabilities
MESHES = (
    "tensor=2",
    "tensor=4",
    "tensor=8",
    "fsdp=2",
    "fsdp=4",
    "fsdp=8",
    "fsdp=2,tensor=2",
    "fsdp=4,tensor=2",
    "data=2",
    "data=2,fsdp=2",
)
LAYOUTS = {
    "Q4_1": ("rows", "planar"),
    "Q4_K": ("rows", "planar"),
    "ternary": ("rows", "planar"),
    "GPTQ": ("rows", "planar"),
}
QUICK = [  # what cuts in a way of its own: planes, supergroups, experts, permutations, heads that do not divide
    ("Q4_K", "planar", "fsdp=2,tensor=2"),
    ("mixtral", "rows", "expert=2,tensor=2"),
    ("GPTQ", "rows", "tensor=2"),
    ("three heads", "rows", "fsdp=2,tensor=2"),
]
REAL = ("smollm2", "gemma3")  # in Q4_1 and in Q4_K_M
LIKELIEST = 256  # of a real model's vocabulary
# By what `tensor` may be, where blocks of inputs do not divide into more.
MOST = {
    ("Q4_1", "planar"): 2,
    ("Q4_K", "planar"): 2,
    ("ternary", "planar"): 1,
    ("GPTQ", "planar"): 2,
    ("three heads", "rows"): 4,
}


def marks_of(name: str) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.slow, pytest.mark.model) if name in REAL else (pytest.mark.slow,)


EVERY = [
    (name, layout, mesh)
    for name in MODELS
    for layout in LAYOUTS.get(name, ("rows",))
    for mesh in (*MESHES, *(("expert=2", "expert=4,tensor=2", "fsdp=2,expert=2") if name == "mixtral" else ()))
    if (name, layout, mesh) not in QUICK
]
REFUSED = [case for case in EVERY if parse_mesh(case[2]).tensor > MOST.get(case[:2], 8)]
EVERY += [("smollm2", "rows", mesh) for mesh in ("tensor=3", "fsdp=2,tensor=3")]
SLOW = [pytest.param(*case, marks=marks_of(case[0])) for case in EVERY if case not in REFUSED]


@pytest.fixture(autouse=True)
def _cuts_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of few tokens cut their residual stream as large ones do."""
    monkeypatch.setattr(residual, "CUT_TOKENS", 1)


@pytest.fixture(scope="module")
def on_one_device(model_path: Callable[[str], Path]) -> Callable[[str], list[np.ndarray]]:
    """The distributions of a model on one device, computed once."""
    known: dict[str, list[np.ndarray]] = {}

    def of(name: str) -> list[np.ndarray]:
        if name not in known:
            known[name] = log_probabilities(model_path(name), None, texts(), most=most_of(name))
        return known[name]

    return of


def most_of(name: str) -> int | None:
    return LIKELIEST if name in REAL else None


def texts() -> list[list[int]]:
    """Of one length, so that a program serves all; three, so that a slice idles."""
    rng = Random(1)
    return [[rng.randrange(3, 200) for _ in range(17)] for _ in range(3)]


@pytest.mark.parametrize(("name", "layout", "mesh"), [*QUICK, *SLOW])
@pytest.mark.parametrize("ring_numbers", [pytest.param(0, id="ring"), pytest.param(1 << 60, id="joined")])
def test_distributions_are_those_of_one_device(
    name: str,
    layout: str,
    mesh: str,
    ring_numbers: int,
    model_path: Callable[[str], Path],
    on_one_device: Callable[[str], list[np.ndarray]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether products' tokens are joined in front of them, or go round in a ring."""
    monkeypatch.setattr(ring, "RING_NUMBERS", ring_numbers)
    found: Any = log_probabilities(model_path(name), mesh, texts(), most=most_of(name), weight_layout=layout)
    for mine, want in zip(found, on_one_device(name), strict=True):
        if name in REAL:  # those near the last of the likeliest may be among them here and not there
            seen = ~np.isnan(mine) & ~np.isnan(want)
            assert (seen.sum(axis=1) > 0.9 * LIKELIEST).all()
            mine, want = mine[seen], want[seen]
        np.testing.assert_allclose(mine, want, atol=CLOSE, rtol=0)


@pytest.mark.parametrize(("name", "layout", "mesh"), [pytest.param(*case, marks=marks_of(case[0])) for case in REFUSED])
def test_what_does_not_divide_is_refused(name: str, layout: str, mesh: str, model_path: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"tensor may be"):
        set_up(model_path(name), mesh, weight_layout=layout)
