"""What `--mesh` means: sizes as text, a name of configs/mesh, or a TOML file. Owns how the text is read."""

import tomllib
from importlib import resources
from pathlib import Path

import jax

from atoma_jax.errors import ConfigError
from sharding.errors import ShardingError
from sharding.mesh import INFERRED, MeshShape, mesh_of, parse_mesh


def read_mesh(text: str | None) -> MeshShape | None:
    """The shape that a setting names, −1 still in it; None where no mesh is wanted.

    Raises:
        ConfigError: it names none.
    """
    if text is None:
        return None
    try:
        if "=" in text:
            return parse_mesh(text)
        return mesh_of(_table(text))
    except ShardingError as error:
        raise ConfigError(error.field, error.value, error.problem) from error


def resolved_mesh(text: str | None, num_devices: int) -> MeshShape | None:
    """The same for a number of devices. A mesh of one device is none.

    Raises:
        ConfigError: it names none, or there are too few devices.
    """
    shape = read_mesh(text)
    if shape is None:
        return None
    try:
        shape = shape.resolved(num_devices)
    except ShardingError as error:
        raise ConfigError(error.field, error.value, error.problem) from error
    return None if shape.num_devices == 1 else shape


def planned_mesh(text: str | None) -> MeshShape | None:
    """The same for devices that need not be there; what is inferred comes from those that are. Errors likewise."""
    shape = read_mesh(text)
    if shape is None or INFERRED in shape.sizes.values():
        return resolved_mesh(text, len(jax.devices()))
    return None if shape.num_devices == 1 else shape


def _table(text: str) -> dict[str, object]:
    """The sizes of a TOML file or of one that is shipped."""
    folder = resources.files("configs") / "mesh"
    if text.endswith(".toml"):
        file = Path(text)
    else:
        known = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
        if text not in known:
            problem = f"must be sizes such as fsdp=2,tensor=4, a .toml file, or one of {', '.join(known)}"
            raise ConfigError("mesh", text, problem)
        file = folder / f"{text}.toml"
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("mesh", text, f"cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("mesh", text, f"is no valid TOML: {error}") from error
