"""Builds the native kernels into the package; all that is declared stands in pyproject.toml.

Where they cannot be built the package is complete without them: the engine then says so and runs on XLA.
"""

import atexit
import importlib.util
import logging
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.dist import Distribution

ROOT = Path(__file__).parent
PLACE = Path("atoma_jax", "native")


def _builder() -> ModuleType:
    """`atoma_jax/native/build.py` by its path: importing the package would import JAX."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / PLACE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(Command):
    """A sub-command of `build`, in setuptools' protocol: into the wheel's tree, or into the sources if editable."""

    description = "compile the native kernels"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        builder = _builder()
        folder = ROOT if self.editable_mode else Path(self.build_lib or ".")
        try:
            builder.build(folder / PLACE / builder.LIBRARY.name)
        except builder.BuildError as error:
            logging.warning("the native kernels were not built: %s", error)

    def get_outputs(self) -> list[str]:
        built = Path(self.build_lib or ".") / PLACE / _builder().LIBRARY.name
        return [str(built)] if built.exists() else []

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in _builder().SOURCES.iterdir()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """With the kernels, and in a folder of its own: what an older build left in `build/` stays out of the wheel."""

    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_base = tempfile.mkdtemp(prefix="atoma-build-")
        atexit.register(shutil.rmtree, self.build_base, ignore_errors=True)


class Wheel(bdist_wheel):
    """For this platform and every Python: the kernels are loaded by ctypes and know no Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Platform(Distribution):
    """One whose files depend on the platform."""

    def has_ext_modules(self) -> bool:
        return True


setup(distclass=Platform, cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel})
