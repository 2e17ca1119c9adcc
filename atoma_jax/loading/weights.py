"""Fills a model's weights from a GGUF file: decodes on the host, packs in the backend's layout, places on the device.

Quantized tensors stay quantized; how they lie on the device is `weight_forms.py`'s. On the CPU a weight is decoded into
the memory that it stays in; elsewhere the host holds the layers of one weight at a time.
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import jax
import numpy as np

from atoma_jax.loading.gguf import GGUFFile
from atoma_jax.loading.names import Part, Rows, WeightSource, weight_sources
from atoma_jax.loading.weight_forms import DenseForm, QuantizedForm, form_of
from atoma_jax.model_spec import ModelSpec
from atoma_jax.models.params import ParamSpec
from atoma_jax.ops import Backend, pack_planar
from atoma_jax.quant.ggml import GroupCodes, decode, dequantize
from atoma_jax.quant.qtensor import QTensor

DECODED_AT_ONCE = 1 << 22  # elements: bounds the temporary memory of a thread
XLA_ALIGNMENT = 64  # bytes

_Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def load_weights(
    file: GGUFFile,
    spec: ModelSpec,
    wanted: Mapping[str, ParamSpec],
    backend: Backend,
    *,
    threads: int,
    on_bytes: Callable[[int], None],
) -> dict[str, jax.Array | QTensor]:
    """Reads every weight that the model wants. Nothing is allocated before all of them are known to fit the file.

    Args:
        file: the open file.
        spec: read from it.
        wanted: `params.specs_of(model)`.
        backend: decides the layout of quantized weights and the type of dense ones.
        threads: that decode at once.
        on_bytes: called with the file's bytes as they are decoded, from any thread.

    Returns:
        Arrays and `QTensor`s on the device, by path.

    Raises:
        WeightFileError: a tensor is missing or misshapen.
        UnsupportedModelError: a tensor has no place in the model, or cannot be laid out.
    """
    sources = weight_sources(file, spec, {path: want.shape for path, want in wanted.items()})
    forms = {path: form_of(file, sources[path], want, backend) for path, want in wanted.items()}
    with ThreadPoolExecutor(threads, thread_name_prefix="load") as pool:
        return {path: _Reader(file, sources[path], pool, on_bytes).read(form) for path, form in forms.items()}


def abstract_weights(
    file: GGUFFile, spec: ModelSpec, wanted: Mapping[str, ParamSpec], backend: Backend
) -> dict[str, jax.ShapeDtypeStruct | QTensor]:
    """What `load_weights` will return, with `ShapeDtypeStruct`s for arrays: programs compile from it during loading.

    Reads no weights. Raises what `load_weights` raises.
    """
    sources = weight_sources(file, spec, {path: want.shape for path, want in wanted.items()})
    return {path: form_of(file, sources[path], want, backend).abstract() for path, want in wanted.items()}


class _Reader:
    """Reads one weight."""

    def __init__(self, file: GGUFFile, source: WeightSource, pool: ThreadPoolExecutor, on_bytes: Callable[[int], None]):
        self._file, self._source, self._pool, self._on_bytes = file, source, pool, on_bytes

    def read(self, form: DenseForm | QuantizedForm) -> jax.Array | QTensor:
        if isinstance(form, DenseForm):
            return self._dense(form)
        return self._rows(form) if form.layout == "rows" else self._planar(form)

    def _dense(self, form: DenseForm) -> jax.Array:
        out = _aligned(form.shape, np.float32)
        layers = out if self._source.stacked else out[None]

        def put(layer: int, part: Part, raw: _Array, at: Rows) -> None:
            values = dequantize(raw, self._file.tensors[part.tensor].type)
            if layers.ndim == 2:
                layers[layer, part.to] = values.reshape(-1)[part.rows]
            else:
                layers[layer, at] = values

        self._each_chunk(put, vector=layers.ndim == 2)
        return jax.device_put(out.astype(form.dtype, copy=False))

    def _rows(self, form: QuantizedForm) -> QTensor:
        arrays = _Children(form)

        def put(layer: int, part: Part, raw: _Array, at: Rows) -> None:
            weights = self._decode(part, raw)
            # Wraps around to the two's complement that is wanted.
            signed = (weights.codes - np.uint8(weights.zero)).view(np.int8)
            arrays.codes[layer, at] = signed.reshape(len(raw), -1, form.group)
            arrays.scales[layer, at] = _spread(weights.scales, weights, form)
            if arrays.mins is not None:
                arrays.mins[layer, at] = 0.0 if weights.mins is None else _spread(weights.mins, weights, form)

        self._each_chunk(put)
        return arrays.place()

    def _planar(self, form: QuantizedForm) -> QTensor:
        arrays = _Children(form)

        def put(layer: int, part: Part, raw: _Array, at: Rows) -> None:
            weights = self._decode(part, raw)
            shift = max(form.zero - weights.zero, 0)
            codes = weights.codes + np.uint8(shift)
            arrays.codes[layer, at] = pack_planar(codes, form.bits, form.plane)
            arrays.scales[layer][:, at] = _spread(weights.scales, weights, form).T
            if arrays.mins is not None:
                surplus = np.float32(weights.zero + shift - form.zero)  # what of the zero point becomes a min
                mins = weights.scales * surplus if weights.mins is None else weights.mins
                arrays.mins[layer][:, at] = _spread(mins, weights, form).T

        self._each_chunk(put)
        return arrays.place()

    def _decode(self, part: Part, raw: _Array) -> GroupCodes:
        return decode(raw, self._file.tensors[part.tensor].type)

    def _each_chunk(self, put: Callable[[int, Part, _Array, Rows], None], *, vector: bool = False) -> None:
        """Calls `put(layer, part, raw rows, where they go)` for chunks of rows, on the pool.

        A vector is one row in the file: `put` sorts its elements.
        """

        def run(layer: int, part: Part, rows: Rows, to: Rows) -> None:
            raw = self._file.tensors[part.tensor].data[rows]
            put(layer, part, raw, to)
            self._on_bytes(raw.nbytes)

        jobs: list[Future[None]] = []
        for layer, parts in enumerate(self._source.layers):
            for part in parts:
                if vector:
                    jobs.append(self._pool.submit(run, layer, part, slice(None), slice(None)))
                    continue
                N, K = self._file.tensors[part.tensor].shape
                rows, to = _indices(part.rows, N), _indices(part.to, N)
                step = max(1, DECODED_AT_ONCE // K)
                for start in range(0, N, step):
                    chunk = slice(start, start + step)
                    jobs.append(self._pool.submit(run, layer, part, _as_slice(rows[chunk]), _as_slice(to[chunk])))
        try:
            for job in jobs:
                job.result()
        finally:  # one failed, or the user pressed Ctrl-C: the rest is not worth waiting for
            for job in jobs:
                job.cancel()


class _Children:
    """The arrays of a `QTensor` on the host, filled by threads, always with an axis of layers."""

    def __init__(self, form: QuantizedForm):
        self._form = form
        self._codes = _aligned(form.codes_shape, form.codes_dtype)
        self._scales = _aligned(form.scales_shape, np.float32)
        self._mins = _aligned(form.scales_shape, np.float32) if form.with_mins else None
        self.codes = self._layers(self._codes)
        self.scales = self._layers(self._scales)
        self.mins = None if self._mins is None else self._layers(self._mins)

    def _layers(self, values: _Array) -> _Array:
        return values if self._form.lead else values[None]

    def place(self) -> QTensor:
        """The `QTensor` on the device, which may have taken the memory over."""
        mins = None if self._mins is None else jax.device_put(self._mins)
        return self._form.qtensor(jax.device_put(self._codes), jax.device_put(self._scales), mins)


def _aligned(shape: tuple[int, ...], dtype: type[np.generic]) -> _Array:
    """An array without values whose memory XLA:CPU takes over as it is; it would copy one that starts elsewhere."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + XLA_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % XLA_ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _spread(values: _Array, weights: GroupCodes, form: QuantizedForm) -> _Array:
    """Scales or mins of a type's groups, repeated for the form's smaller ones."""
    repeat = weights.group // form.group
    return values if repeat == 1 else np.repeat(values, repeat, axis=1)


def _indices(rows: Rows, N: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The N rows that an index of a `Part` names."""
    if isinstance(rows, slice):
        start = rows.start or 0
        return np.arange(start, start + N)
    return rows


def _as_slice(rows: np.ndarray[Any, np.dtype[np.int64]]) -> Rows:
    """Neighbouring rows as a slice, which numpy reads in place."""
    if bool((np.diff(rows) == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows
