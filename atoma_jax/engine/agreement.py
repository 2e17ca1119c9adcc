"""What the processes of one engine must have in common: they compile the same programs and hold one model.

Files are compared by what headers say and by every tensor's first row, where fine-tuned models of one shape differ.
"""

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import jax

from atoma_jax.config import EngineConfig
from atoma_jax.engine.model_setup import ModelSetup
from atoma_jax.loading.orbax.checkpoint import OrbaxModel

# Where things are on a host, and who it is.
_OWN = ("model", "revision", "compile_cache_dir", "coordinator_address", "num_processes", "process_id")


def facts_of(config: EngineConfig, setup: ModelSetup, programs: Sequence[object]) -> dict[str, Any]:
    """By what users call it, as plain values; for `Cluster.agree`."""
    sections = config.sections().values()
    settings = {name: value for section in sections for name, value in section.items() if name not in _OWN}
    backend = {f"backend.{name}": str(value) for name, value in dataclasses.asdict(setup.backend).items()}
    return {
        "version of atoma-jax": _own_version(),
        "version of JAX": jax.__version__,
        **settings,
        **backend,
        "programs": ", ".join(map(str, programs)),
        "model": fingerprint(setup),
    }


def _own_version() -> str:
    try:
        return importlib.metadata.version("atoma-jax")
    except importlib.metadata.PackageNotFoundError:  # a tree that is not installed
        return "unknown"


def fingerprint(setup: ModelSetup) -> str:
    """16 hex digits of a model: its shape, its weights as planned, and some of their values."""
    checkpoint, digest = setup.checkpoint, hashlib.sha256()
    digest.update(repr((setup.spec, setup.vocab_size)).encode())
    for path in sorted(setup.planned):
        digest.update(repr((path, setup.planned[path])).encode())
    if isinstance(checkpoint, OrbaxModel):
        digest.update(repr(sorted(checkpoint.manifest.files.items())).encode())
        return digest.hexdigest()[:16]
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(repr((name, tensor.type_name, tensor.shape, tensor.nbytes)).encode())
        digest.update(tensor.dequantize(slice(0, 1)).tobytes())
    return digest.hexdigest()[:16]
