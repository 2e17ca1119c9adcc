"""Dataclasses as groups of command-line flags, so that what commands share is written once. Owns no flag itself."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def flat_options(command: Callable[..., None]) -> Callable[..., None]:
    """Lets a command take dataclasses: typer sees each field, annotated with `typer.Option`, as a flag of the command.

    Args:
        command: a function whose parameters are flags, or dataclasses of flags. All names must differ.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            groups[parameter.name] = kind
            fields = get_type_hints(kind, include_extras=True)
            parameters += [
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=fields[field.name]
                )
                for field in dataclasses.fields(kind)
            ]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind))

    @functools.wraps(command)
    def flattened(**flags: Any) -> None:
        for name, kind in groups.items():
            flags[name] = kind(**{field.name: flags.pop(field.name) for field in dataclasses.fields(kind)})
        command(**flags)

    flattened.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    flattened.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flattened
