"""Tokenizers: text to ids, ids to text, whole or as a stream, and chat templates in a sandbox."""

from atoma_jax.tokenizer.chat_template import TemplateLimits
from atoma_jax.tokenizer.detokenizer import IncrementalDecoder
from atoma_jax.tokenizer.from_folder import load_folder_tokenizer
from atoma_jax.tokenizer.from_gguf import load_gguf_tokenizer
from atoma_jax.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDecoder", "TemplateLimits", "Tokenizer", "load_folder_tokenizer", "load_gguf_tokenizer"]
