"""A model on disk, whatever its container: opened, its shape read, and where each weight lies."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from atoma_jax.errors import UnsupportedModelError
from atoma_jax.loading.gguf import GGUFFile
from atoma_jax.loading.gguf_names import gguf_sources
from atoma_jax.loading.gguf_spec import read_spec
from atoma_jax.loading.hub import ResolvedModel
from atoma_jax.loading.orbax_checkpoint import OrbaxModel
from atoma_jax.loading.weight_sources import WeightSource
from atoma_jax.model_spec import ModelSpec
from atoma_jax.models.params import ParamSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """An open checkpoint and the model that it holds."""

    checkpoint: GGUFFile
    spec: ModelSpec

    def sources(self, wanted: Mapping[str, ParamSpec]) -> dict[str, WeightSource]:
        """Where every weight of the model is.

        Raises:
            WeightFileError: a tensor is missing or misshapen.
            UnsupportedModelError: a tensor has no place in the model.
        """
        return gguf_sources(self.checkpoint, self.spec, wanted)


@contextmanager
def open_model(found: ResolvedModel, *, max_model_len: int | None = None) -> Generator[ModelFiles | OrbaxModel]:
    """Opens what `hub.resolve` found; closed again at the end.

    Args:
        found: a GGUF file or a folder.
        max_model_len: tokens that will be served, where that decides how positions are rotated.

    Raises:
        UserError: the files are damaged or hold a model that is not implemented; see the subclasses.
    """
    if found.kind == "orbax":
        yield OrbaxModel.open(found.path)
        return
    if found.kind != "gguf":
        raise UnsupportedModelError(
            "model",
            str(found.path),
            "must be a GGUF file or a folder with one: safetensors folders are not implemented",
        )
    with GGUFFile.open(found.path) as file:
        yield ModelFiles(checkpoint=file, spec=read_spec(file, max_model_len=max_model_len))
