"""Makes a quantized GGUF file from another: chooses types, quantizes chunk by chunk in threads, writes as it goes.

Owns the order of work and its limits: memory stays at a few chunks a thread, whatever the size of the model. Types are
`mixtures.py`'s choice, blocks `quant/quantizers.py`'s, the container `writer.py`'s.
"""

import logging
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from atoma_jax.errors import ConfigError
from atoma_jax.loading.gguf.file import GGUFFile, GGUFTensor, encoded_metadata, first_shard
from atoma_jax.loading.gguf.mixtures import Choice, ModelFacts, TypeOptions, choose_types
from atoma_jax.loading.gguf.writer import GGUFWriter, TensorEntry, check_target, encode_u32
from atoma_jax.loading.threads import checked_threads
from atoma_jax.quant.ggml import FLOAT_TYPES
from atoma_jax.quant.ggml_types import GGMLType
from atoma_jax.quant.quantizers import quantize

_Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
OnProgress: TypeAlias = Callable[[int, int], object]  # elements done, elements in all

_CHUNK = 1 << 20  # elements a thread works on: 4 MB of f32, and a few times that while it is quantized
_QUANTIZATION_VERSION = 2  # of ggml's block layouts
_OWN_KEYS = ("general.file_type", "general.quantization_version")
_SHARD_NUMBER = re.compile(r"-\d{5}-of-(\d{5}\.gguf)$")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TypeTotal:
    """All tensors of one type in the result."""

    type: str
    tensors: int
    elements: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.nbytes / self.elements


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What was made of what.

    Attributes:
        source_bytes: the tensors of the model that was read, in its files.
        target_bytes: those of the result.
        file_bytes: the whole result.
        elements: weights of the model.
        types: totals of the result, the largest first.
        fallbacks: tensors whose rows the mixture's type does not fit, and what they got instead.
        requantized: types of the source that had lost something already.
    """

    source_bytes: int
    target_bytes: int
    file_bytes: int
    elements: int
    types: tuple[TypeTotal, ...]
    fallbacks: dict[str, str]
    requantized: tuple[str, ...]


def requantize(
    source: Path,
    target: Path,
    options: TypeOptions,
    *,
    threads: int | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Summary:
    """Writes `target`, whose tensors are those of `source` in other types. All metadata are kept.

    Args:
        source: a GGUF file, or any shard of a split one; plain floats, or quantized and then decoded first.
        target: a path in a folder that exists. There is no file before all of it is written.
        options: which types.
        threads: that quantize; None: one a core.
        overwrite: replace a file that is there.
        on_progress: called after every chunk, if given.

    Raises:
        UserError: the result cannot be written, or holds values that a type cannot; ConfigError, ModelNotFoundError,
            WeightFileError and UnsupportedModelError, which are UserErrors, about settings and about the source.
    """
    threads = checked_threads(threads)
    check_target(target, force=overwrite)
    with GGUFFile.open(source) as file:
        if target.exists() and any(target.samefile(shard) for shard in _shards(file)):
            raise ConfigError("out", str(target), "is the file to be read; name another one")
        tensors = file.tensors
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        choices = choose_types(shapes, ModelFacts.read(file.metadata), options, str(source))
        requantized = _warn_of_losses(tensors, choices)
        types = {name: choices[name].type if name in choices else tensor.type for name, tensor in tensors.items()}
        entries = [TensorEntry(name, tensor.shape, types[name]) for name, tensor in tensors.items()]
        alignment = file.metadata.get_int("general.alignment", 32)
        elements = sum(prod(shape) for shape in shapes.values())
        writer = GGUFWriter(target, _metadata(file, options), entries, alignment=alignment)
        with writer, ThreadPoolExecutor(threads) as pool:
            done = 0
            for data, count in _converted(tensors, types, str(source), pool, ahead=2 * threads):
                writer.write(data)
                done += count
                if on_progress is not None:
                    on_progress(done, elements)
        return Summary(
            source_bytes=sum(tensor.nbytes for tensor in tensors.values()),
            target_bytes=sum(entry.nbytes for entry in entries),
            file_bytes=writer.file_size,
            elements=elements,
            types=_totals(entries),
            fallbacks={name: choice.type.name for name, choice in choices.items() if choice.type != choice.wanted},
            requantized=requantized,
        )


def _shards(file: GGUFFile) -> list[Path]:
    count = file.metadata.get_int("split.count", 1)
    if count <= 1:
        return [file.path]
    names = [_SHARD_NUMBER.sub(rf"-{number:05}-of-\1", file.path.name) for number in range(1, count + 1)]
    return [file.path.with_name(name) for name in names]


def _metadata(file: GGUFFile, options: TypeOptions) -> dict[str, bytes]:
    """Encoded entries of the result: the source's own bytes, so that every value keeps its type."""
    kept = {key: entry for key, entry in encoded_metadata(first_shard(file)).items() if key not in _OWN_KEYS}
    values = (options.mixture.file_type, _QUANTIZATION_VERSION)
    return kept | {key: encode_u32(key, value) for key, value in zip(_OWN_KEYS, values, strict=True)}


def _warn_of_losses(tensors: dict[str, GGUFTensor], choices: dict[str, Choice]) -> tuple[str, ...]:
    """Says which types will be quantized a second time."""
    lossy = Counter(
        tensors[name].type.name
        for name, choice in choices.items()
        if tensors[name].type not in FLOAT_TYPES and tensors[name].type != choice.type
    )
    if lossy:
        found = ", ".join(f"{count} of {name}" for name, count in lossy.most_common())
        _log.warning("tensors are quantized already (%s): what that lost stays lost; prefer an F16 or BF16 file", found)
    return tuple(name for name, _ in lossy.most_common())


def _converted(
    tensors: dict[str, GGUFTensor], types: dict[str, GGMLType], field: str, pool: ThreadPoolExecutor, *, ahead: int
) -> Iterator[tuple[_Bytes, int]]:
    """Data of all tensors in order, in pieces, with how many elements each holds; at most `ahead` are in the making."""
    pending: deque[tuple[Future[_Bytes], int]] = deque()
    try:
        for name, tensor in tensors.items():
            for rows in _chunks(tensor):
                piece = pool.submit(_convert, tensor, rows, types[name], f"{field}: tensor {name!r}")
                pending.append((piece, prod(tensor.shape) // len(tensor.data) * (rows.stop - rows.start)))
                if len(pending) >= ahead:
                    future, count = pending.popleft()
                    yield future.result(), count
        while pending:
            future, count = pending.popleft()
            yield future.result(), count
    finally:
        for future, _ in pending:
            future.cancel()


def _chunks(tensor: GGUFTensor) -> Iterator[slice]:
    rows = len(tensor.data)
    step = max(1, _CHUNK * rows // prod(tensor.shape))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _convert(tensor: GGUFTensor, rows: slice, ggml_type: GGMLType, field: str) -> _Bytes:
    if tensor.type == ggml_type:
        return tensor.data[rows]
    return quantize(tensor.dequantize(rows), ggml_type, field)


def _totals(entries: list[TensorEntry]) -> tuple[TypeTotal, ...]:
    totals: dict[str, TypeTotal] = {}
    for entry in entries:
        name = entry.type.name
        before = totals.get(name, TypeTotal(name, 0, 0, 0))
        totals[name] = TypeTotal(
            name, before.tensors + 1, before.elements + prod(entry.shape), before.nbytes + entry.nbytes
        )
    return tuple(sorted(totals.values(), key=lambda total: -total.nbytes))
