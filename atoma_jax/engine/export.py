"""`atoma-jax convert --to gguf`: weights in the engine's own layout back into a GGUF file, as float32 and exact.

Owns which rows of which weight make up which tensor again, one weight's memory at a time beside the weights themselves.
"""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from atoma_jax.config import ModelConfig
from atoma_jax.engine.convert import Conversion
from atoma_jax.engine.model_setup import set_up_model
from atoma_jax.errors import ConfigError, UnsupportedModelError
from atoma_jax.loading.checkpoint import Floats, Permutation, Rows
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.gguf.file import GGUFFile, encoded_metadata
from atoma_jax.loading.gguf.names import SPARE, gguf_sources
from atoma_jax.loading.gguf.writer import GGUFWriter, TensorEntry, check_target, encode_u32
from atoma_jax.loading.model_files import open_model
from atoma_jax.loading.orbax.checkpoint import GGUF_METADATA, OrbaxModel
from atoma_jax.loading.orbax.weights import Weight
from atoma_jax.loading.threads import checked_threads
from atoma_jax.loading.weight_sources import Part
from atoma_jax.quant.dequantized import dequantized
from atoma_jax.quant.ggml_types import GGMLType
from atoma_jax.quant.groups import F32, GroupCodes
from atoma_jax.quant.qtensor import LayerVariants, QTensor

_ALL_F32 = 0  # llama.cpp's number of the file type


@dataclass(frozen=True, slots=True)
class _NamedShape:
    """A tensor of the file that was converted, of which only name and shape are left: a `StoredTensor` without data."""

    name: str
    shape: tuple[int, ...]
    format: None = None
    type_name: str = "F32"
    float_dtype: np.dtype[Any] = F32
    permutation: Permutation | None = None

    @property
    def nbytes(self) -> int:
        """Bytes as float32."""
        return 4 * prod(self.shape)

    def decode(self, rows: Rows) -> GroupCodes:  # noqa: ARG002
        """There is nothing to decode."""
        raise AssertionError(self.name)

    def dequantize(self, rows: Rows) -> Floats:  # noqa: ARG002
        """There is nothing to decode."""
        raise AssertionError(self.name)


@dataclass(frozen=True, slots=True)
class _Names:
    """The tensors of the file that was converted: a `Checkpoint` without data."""

    path: Path
    tensors: Mapping[str, _NamedShape]


class _Place(NamedTuple):
    """Rows of a tensor in a block of a weight, one of several on its flattened leading axes."""

    path: str
    block: int
    blocks: int
    part: Part


def export_gguf(
    config: ModelConfig, out: Path, *, force: bool = False, threads: int | None = None, progress: bool = True
) -> Conversion:
    """Writes a GGUF file whose tensors are the weights' exact values in float32, with the keys of the original.

    Args:
        config: names a folder that `convert_model` wrote.
        out: the file; its folder must exist.
        force: replace a file that is there.
        threads: that read the folder's files; None: one a core.
        progress: show a bar on standard error, where that is a terminal, for what is loaded.

    Raises:
        UserError: the folder cannot be used, GGUF has no place for what it holds, or the file cannot be written.
    """
    check_target(out, force=force)
    found = resolve(config.model, revision=config.revision, progress=False)
    with open_model(found, max_model_len=config.max_model_len) as files:
        if not isinstance(files, OrbaxModel):
            raise ConfigError("model", config.model, "must be a folder of `atoma-jax convert` to become a GGUF file")
        _check_exportable(files)
        setup = set_up_model(config, files)
        begin = time.perf_counter()
        weights = setup.load_values(threads=checked_threads(threads), progress=progress)
        loaded = time.perf_counter()
        file_bytes = _write(files, weights, _places(files, setup.wanted), out)
        return Conversion(
            path=out,
            kind="gguf",
            layout=setup.backend.weight_layout,
            operands=setup.backend.operands,
            source_bytes=sum(file.nbytes for file in files.manifest.files.values()),
            weight_bytes=sum(4 * prod(shape) for shape in files.manifest.tensors.values()),
            file_bytes=file_bytes,
            seconds={"read": loaded - begin, "write": time.perf_counter() - loaded},
        )


def _check_exportable(model: OrbaxModel) -> None:
    stored = model.manifest
    field = f"{model.path / 'model.json'}"
    if stored.source_kind != "gguf":
        problem = "must be gguf: names and keys for GGUF are known of models that came from it only"
        raise UnsupportedModelError(f"{field}: source_kind", stored.source_kind, problem)
    if stored.quantization == "w8a8":
        problem = "has no GGUF equivalent: its activations are int8; convert the model without it first"
        raise UnsupportedModelError(f"{field}: quantization", stored.quantization, problem)


def _places(model: OrbaxModel, wanted: Any) -> dict[str, list[_Place]]:
    """For each tensor, where its rows are."""
    tensors = {name: _NamedShape(name, shape) for name, shape in model.manifest.tensors.items() if name not in SPARE}
    sources = gguf_sources(_Names(model.path, tensors), model.spec, wanted)
    places: dict[str, list[_Place]] = defaultdict(list)
    for path, source in sources.items():
        for index, parts in enumerate(source.blocks):
            for part in parts:
                places[part.tensor].append(_Place(path, index, len(source.blocks), part))
    return places


def _write(
    model: OrbaxModel,
    weights: Mapping[str, Weight],
    places: Mapping[str, list[_Place]],
    out: Path,
) -> int:
    header = model.path / GGUF_METADATA
    entries = encoded_metadata(header) | {"general.file_type": encode_u32("general.file_type", _ALL_F32)}
    with GGUFFile.open(header) as spare:
        tensors = [TensorEntry(tensor.name, tensor.shape, tensor.type) for tensor in spare.tensors.values()]
        tensors += [TensorEntry(name, model.manifest.tensors[name], GGMLType.F32) for name in places]
        alignment = spare.metadata.get_int("general.alignment", 32)
        with GGUFWriter(out, entries, tensors, alignment=alignment) as writer:
            for tensor in spare.tensors.values():
                writer.write(np.ascontiguousarray(tensor.data))
            for name, parts in places.items():
                writer.write(_tensor(model.manifest.tensors[name], weights, parts).view(np.uint8))
    return writer.file_size


def _tensor(shape: tuple[int, ...], weights: Mapping[str, Weight], parts: list[_Place]) -> Floats:
    """One tensor's values, as they lay in the file."""
    rows = shape if len(shape) == 1 else (prod(shape[:-1]), shape[-1])
    values = np.empty(rows, np.float32)
    for place in parts:
        weight, index = weights[place.path], place.block
        if isinstance(weight, LayerVariants):  # a block is a layer's, or one of its experts'
            experts = place.blocks // len(weight.which)
            layer, expert = divmod(index, experts)
            weight, index = weight.stacks[weight.which[layer]], weight.place[layer] * experts + expert
        values[place.part.rows] = _block(weight, index, vector=len(shape) == 1)[place.part.to]
    return values.reshape(-1)


def _block(weight: jax.Array | QTensor, index: int, *, vector: bool) -> Floats:
    """One block of a weight: a layer's or an expert's matrix `[N, K]`, or a layer's vector."""
    if not isinstance(weight, QTensor):
        own = 1 if vector else 2
        return np.asarray(weight.reshape(-1, *weight.shape[-own:])[index]).astype(np.float32)
    lead = len(weight.lead)

    def pick(leaf: jax.Array) -> np.ndarray[Any, np.dtype[Any]]:
        return np.asarray(leaf.reshape(-1, *leaf.shape[lead:])[index])

    return dequantized(jax.tree.map(pick, weight))
