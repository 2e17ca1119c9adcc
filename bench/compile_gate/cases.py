"""What a kernel hands the compile gate: a function, abstract arguments, and how much work its main loop does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Target = Literal["h200", "a100", "b200"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCase:
    """One kernel at one shape.

    Attributes:
        name: its row in the table; unique.
        kernel: regular expression of the `name=` that its `pallas_call`s have. All that match are recorded.
        function: what is jitted, but for `device=`, the GPU's name as JAX calls it.
        arguments: `jax.ShapeDtypeStruct`s, or trees of them.
        weights: weights that a thread unpacks in one turn of the main loop, for operations a weight; None: not counted.
        quick: part of the run without `--all`.
        targets: GPUs that it is compiled for.
    """

    name: str
    kernel: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    weights: float | None = None
    quick: bool = False
    targets: tuple[Target, ...] = ("h200", "a100", "b200")
