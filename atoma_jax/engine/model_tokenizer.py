"""The tokenizer of an open model, from whatever its container keeps one in."""

from atoma_jax.loading.model_files import ModelFiles
from atoma_jax.loading.orbax_checkpoint import OrbaxModel
from atoma_jax.tokenizer import Tokenizer, load_folder_tokenizer, load_gguf_tokenizer


def load_tokenizer(files: ModelFiles | OrbaxModel) -> Tokenizer:
    """Raises what `load_gguf_tokenizer` and `load_folder_tokenizer` raise."""
    if isinstance(files, OrbaxModel):
        if files.manifest.source_kind == "folder":
            return load_folder_tokenizer(files.path)
        return load_gguf_tokenizer(files.metadata, source=str(files.path))
    return load_gguf_tokenizer(files.checkpoint.metadata, source=str(files.checkpoint.path))
