"""The tokenizer of an open model, whatever container it came in; it must fit the model's embedding."""

from pathlib import Path

from atoma_jax.errors import UnsupportedModelError
from atoma_jax.loading.hf.checkpoint import HFCheckpoint
from atoma_jax.loading.model_files import ModelFiles
from atoma_jax.loading.orbax.checkpoint import OrbaxModel
from atoma_jax.model_spec import ModelSpec
from atoma_jax.tokenizer import Tokenizer, load_folder_tokenizer, load_gguf_tokenizer


def tokenizer_of(files: ModelFiles | OrbaxModel) -> Tokenizer:
    """The tokenizer of an open model.

    Raises:
        WeightFileError: it is damaged.
        UnsupportedModelError: it is of a kind that is not implemented, or does not fit the model.
    """
    checkpoint = files if isinstance(files, OrbaxModel) else files.checkpoint
    metadata = None if isinstance(checkpoint, HFCheckpoint) else checkpoint.metadata
    if metadata is None:
        return load_folder_tokenizer(checkpoint.path, rows=files.spec.vocab_size)
    tokenizer = load_gguf_tokenizer(metadata, source=str(checkpoint.path))
    _check_vocabulary(tokenizer.vocab_size, files.spec, checkpoint.path)
    return tokenizer


def _check_vocabulary(tokens: int, spec: ModelSpec, path: Path) -> None:
    if tokens != spec.vocab_size:
        raise UnsupportedModelError(
            f"{path}: metadata 'tokenizer.ggml.tokens'",
            tokens,
            f"must have one entry for each of the {spec.vocab_size} rows of token_embd",
        )
