"""A model on disk, whatever its container: opened, its shape read, and where each weight lies."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from atoma_jax.loading.fetch.hub import ResolvedModel
from atoma_jax.loading.generation_defaults import GenerationDefaults, read_generation_defaults, read_gguf_defaults
from atoma_jax.loading.gguf.file import GGUFFile
from atoma_jax.loading.gguf.names import gguf_sources
from atoma_jax.loading.gguf.side_scales import ScaledFile, with_side_scales
from atoma_jax.loading.gguf.spec import read_spec
from atoma_jax.loading.hf.checkpoint import HFCheckpoint
from atoma_jax.loading.hf.names import hf_sources
from atoma_jax.loading.hf.spec import read_hf_spec
from atoma_jax.loading.json_file import Section
from atoma_jax.loading.orbax.checkpoint import OrbaxModel
from atoma_jax.loading.weight_sources import WeightSource
from atoma_jax.model_spec import ModelSpec
from atoma_jax.models.params import ParamSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """An open checkpoint and the model that it holds."""

    checkpoint: GGUFFile | ScaledFile | HFCheckpoint
    spec: ModelSpec
    generation_defaults: GenerationDefaults

    def sources(self, wanted: Mapping[str, ParamSpec]) -> dict[str, WeightSource]:
        """Where every weight of the model is.

        Raises:
            WeightFileError: a tensor is missing or misshapen.
            UnsupportedModelError: a tensor has no place in the model.
        """
        names = hf_sources if isinstance(self.checkpoint, HFCheckpoint) else gguf_sources
        return names(self.checkpoint, self.spec, wanted)


@contextmanager
def open_model(found: ResolvedModel, *, max_model_len: int | None = None) -> Generator[ModelFiles | OrbaxModel]:
    """Opens what `hub.resolve` found; closed again at the end.

    Args:
        found: a GGUF file, or a folder in HF layout or of `atoma-jax convert`.
        max_model_len: tokens that will be served, where that decides how positions are rotated.

    Raises:
        UserError: the files are damaged or hold a model that is not implemented; see the subclasses.
    """
    if found.kind == "orbax":
        yield OrbaxModel.open(found.path)
        return
    if found.kind == "gguf":
        with GGUFFile.open(found.path) as file:
            spec = read_spec(file, max_model_len=max_model_len)
            defaults = read_gguf_defaults(file.metadata)
            yield ModelFiles(checkpoint=with_side_scales(file), spec=spec, generation_defaults=defaults)
        return
    with HFCheckpoint.open(found.path) as folder:
        yield _from_folder(folder, max_model_len)


def _from_folder(folder: HFCheckpoint, max_model_len: int | None) -> ModelFiles:
    generation = Section(f"{folder.path / 'generation_config.json'}: generation_config", folder.generation_config)
    return ModelFiles(
        checkpoint=folder,
        spec=read_hf_spec(
            Section(f"{folder.path / 'config.json'}: config", folder.config),
            int8_activations=folder.activation_scheme == "int8_token",
            max_model_len=max_model_len,
        ),
        generation_defaults=read_generation_defaults(generation),
    )
