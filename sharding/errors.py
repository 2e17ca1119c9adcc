"""What is raised where a mesh, its rules and an array do not fit together. Imports nothing of the engine."""

from typing import Any


class ShardingError(ValueError):
    """A mesh cannot be built, or an array cannot be cut over it.

    Attributes:
        field: what is at fault: an axis of the mesh, or an array and its dimension.
        value: what was given.
        problem: the limit and what to change.
    """

    def __init__(self, field: str, value: Any, problem: str):
        super().__init__(f"{field}: {problem}, got {value!r}.")
        self.field, self.value, self.problem = field, value, problem
