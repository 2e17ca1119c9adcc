"""Fills a model's weights from a checkpoint: decodes on the host, packs in the backend's layout, places on the device.

Quantized tensors stay quantized; how they lie on the device is `weight_forms.py`'s. On the CPU a weight is decoded into
the memory that it stays in; elsewhere the host holds the layers of one weight at a time. Over several devices it is
decoded once, and each row goes to the parts that hold some of it (`host_parts.py`).
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import jax
import numpy as np

from atoma_jax.loading.checkpoint import Checkpoint, Rows
from atoma_jax.loading.host_parts import HostParts
from atoma_jax.loading.weight_forms import DenseForm, Form, QuantizedForm, VariantsForm, form_of
from atoma_jax.loading.weight_sources import Part, WeightSource
from atoma_jax.models.params import ParamSpec
from atoma_jax.ops import Backend, pack_planar, put_codes, put_factors
from atoma_jax.quant.groups import Factors
from atoma_jax.quant.merging import recast
from atoma_jax.quant.qtensor import TILE, TILE_BLOCK, LayerVariants, QTensor

DECODED_AT_ONCE = 1 << 22  # elements: bounds the temporary memory of a thread

_Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def load_weights(
    checkpoint: Checkpoint,
    sources: Mapping[str, WeightSource],
    wanted: Mapping[str, ParamSpec],
    backend: Backend,
    *,
    threads: int,
    on_bytes: Callable[[int], None],
    places: Mapping[str, Any] | None = None,
) -> dict[str, jax.Array | QTensor | LayerVariants]:
    """Reads every weight that the model wants. Nothing is allocated before all of them are known to have a form.

    Args:
        checkpoint: the open file or folder.
        sources: where each weight is in it, checked.
        wanted: `params.specs_of(model)`.
        backend: decides the layout of quantized weights and the type of dense ones.
        threads: that decode at once.
        on_bytes: called with the file's bytes as they are decoded, from any thread.
        places: trees of shardings, by path, like the weights; None: this process's first device.

    Returns:
        Arrays, `QTensor`s and `LayerVariants` on the device, by path.

    Raises:
        UnsupportedModelError: a tensor cannot be laid out.
    """
    forms = {path: form_of(checkpoint, sources[path], want, backend) for path, want in wanted.items()}
    with ThreadPoolExecutor(threads, thread_name_prefix="load") as pool:

        def read(form: Form, source: WeightSource, place: Any) -> jax.Array | QTensor:
            return _Reader(checkpoint, source, pool, on_bytes, place).read(form)

        def weight(path: str, form: Form | VariantsForm) -> jax.Array | QTensor | LayerVariants:
            place = None if places is None else places[path]
            if not isinstance(form, VariantsForm):
                return read(form, sources[path], place)
            stacks = (None,) * len(form.stacks) if place is None else place.stacks
            return form.variants([read(*stack, where) for stack, where in zip(form.stacks, stacks, strict=True)])

        return {path: weight(path, form) for path, form in forms.items()}


def abstract_weights(
    checkpoint: Checkpoint, sources: Mapping[str, WeightSource], wanted: Mapping[str, ParamSpec], backend: Backend
) -> dict[str, jax.ShapeDtypeStruct | QTensor | LayerVariants]:
    """What `load_weights` will return, with `ShapeDtypeStruct`s for arrays: programs compile from it during loading.

    Reads no weights. Raises what `load_weights` raises.
    """
    return {path: form_of(checkpoint, sources[path], want, backend).abstract() for path, want in wanted.items()}


class _Reader:
    """Reads one weight."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: WeightSource,
        pool: ThreadPoolExecutor,
        on_bytes: Callable[[int], None],
        place: Any,
    ):
        """`place`: the sharding of an array, a `QTensor` of them, or None."""
        self._tensors, self._source, self._pool, self._on_bytes = checkpoint.tensors, source, pool, on_bytes
        self._place = place

    def read(self, form: DenseForm | QuantizedForm) -> jax.Array | QTensor:
        return self._dense(form) if isinstance(form, DenseForm) else self._quantized(form)

    def _dense(self, form: DenseForm) -> jax.Array:
        lead = len(self._source.lead)
        out = HostParts(form.shape, form.dtype, lead, self._place)
        self._fill_up(form.shape[lead], [out])
        vector = len(form.shape) == lead + 1

        def put(block: int, part: Part, rows: Rows, to: Rows) -> None:
            values = self._tensors[part.tensor].dequantize(rows)
            values = values.reshape(-1)[part.rows] if vector else values
            out.put(block, to, values + np.float32(part.plus) if part.plus else values)

        self._each_chunk(put, out.wants, None if vector else form.shape[-2])
        return out.on_devices()

    def _quantized(self, form: QuantizedForm) -> QTensor:
        lead = len(self._source.lead)
        blocks = {
            name: HostParts(child.shape, child.dtype, lead, None if self._place is None else getattr(self._place, name))
            for name, child in form.children().items()
        }
        self._fill_up(form.shape[0], list(blocks.values()))
        ways = {"rows": self._put_rows, "planar": self._put_planar, "tiles": self._put_tiles}
        put = ways[form.layout](form, blocks)
        if form.permuted:
            self._put_permutations(blocks["permutation"], form.shape[1])
        self._each_chunk(put, blocks["codes"].wants, form.shape[0])
        return form.qtensor({name: array.on_devices() for name, array in blocks.items()})

    def _fill_up(self, num_rows: int, arrays: list[HostParts]) -> None:
        """Zeros, where rows of the weight come from no tensor."""
        parts = self._source.blocks[0]
        if sum(len(_indices(part.to, num_rows)) for part in parts) < num_rows:
            for array in arrays:
                array.clear()

    def _put_rows(self, form: QuantizedForm, blocks: dict[str, HostParts]) -> "_Put":
        def put(block: int, part: Part, rows: Rows, to: Rows) -> None:
            weights = self._tensors[part.tensor].decode(rows)
            repeat = weights.format.group // form.format.group
            numbers = weights.signed()
            blocks["codes"].put(block, to, numbers.reshape(len(numbers), -1, form.format.group))
            scales = np.repeat(weights.scales.flat(), repeat, axis=1)
            blocks["scales"].put(block, to, scales)
            if "mins" in blocks:
                mins = np.zeros_like(scales)
                if weights.mins is not None:
                    mins = np.repeat(weights.mins.flat(), repeat, axis=1)
                blocks["mins"].put(block, to, mins)

        return put

    def _put_planar(self, form: QuantizedForm, blocks: dict[str, HostParts]) -> "_Put":
        def put(block: int, part: Part, rows: Rows, to: Rows) -> None:
            weights = recast(self._tensors[part.tensor].decode(rows), form.format)
            blocks["codes"].put(block, to, pack_planar(weights.codes, form.format.bits, form.plane))
            _put_factors(blocks, block, to, "scales", "scale_supers", weights.scales)
            if weights.mins is not None:
                _put_factors(blocks, block, to, "mins", "min_supers", weights.mins)

        return put

    def _put_tiles(self, form: QuantizedForm, blocks: dict[str, HostParts]) -> "_Put":
        (N, K), bits = form.shape, form.format.bits
        if N % TILE or K % TILE_BLOCK:
            for array in blocks.values():
                array.clear()  # what fills up tiles and blocks
        whole = {name: array.whole for name, array in blocks.items()}

        def put(block: int, part: Part, rows: Rows, to: Rows) -> None:
            weights = recast(self._tensors[part.tensor].decode(rows), form.format)
            codes = weights.codes if bits < 8 else weights.signed().view(np.uint8) ^ np.uint8(128)
            put_codes(codes, bits, to, whole["codes"][block])
            for name, factors in (("scale", weights.scales), ("min", weights.mins)):
                if factors is not None:
                    put_factors(factors.values, to, whole[f"{name}s"][block])
                    if factors.supers is not None:
                        put_factors(factors.supers, to, whole[f"{name}_supers"][block])

        return put

    def _put_permutations(self, out: HostParts, K: int) -> None:
        for block, parts in enumerate(self._source.blocks):
            order = self._tensors[parts[0].tensor].permutation
            out.put(block, slice(0, K), np.arange(K, dtype=np.int32) if order is None else order)

    def _each_chunk(self, put: "_Put", wants: "_Wants", num_rows: int | None) -> None:
        """Calls `put(block, part, rows of the tensor, rows of the weight)` for chunks of rows, on the pool.

        Args:
            put: stores what it reads.
            wants: whether a device of this process holds any of a block's rows; the others are not decoded.
            num_rows: of one block of the weight; None for a vector, one row in the file whose elements `put` sorts.
        """

        def run(block: int, part: Part, rows: Rows, to: Rows, nbytes: int) -> None:
            if wants(block, to):
                put(block, part, rows, to)
            self._on_bytes(nbytes)

        jobs: list[Future[None]] = []
        for block, parts in enumerate(self._source.blocks):
            for part in parts:
                tensor = self._tensors[part.tensor]
                if num_rows is None:
                    jobs.append(self._pool.submit(run, block, part, slice(None), part.to, tensor.nbytes))
                    continue
                N, K = math.prod(tensor.shape[:-1]), tensor.shape[-1]
                rows, to = _indices(part.rows, N), _indices(part.to, num_rows)
                step = max(1, DECODED_AT_ONCE // K)
                for start in range(0, len(rows), step):
                    chunk = slice(start, start + step)
                    nbytes = tensor.nbytes * len(rows[chunk]) // N
                    jobs.append(
                        self._pool.submit(run, block, part, _as_slice(rows[chunk]), _as_slice(to[chunk]), nbytes)
                    )
        try:
            for job in jobs:
                job.result()
        finally:  # one failed, or the user pressed Ctrl-C: the rest is not worth waiting for
            for job in jobs:
                job.cancel()


_Put: TypeAlias = Callable[[int, Part, Rows, Rows], None]
_Wants: TypeAlias = Callable[[int, Rows], bool]


def _put_factors(
    blocks: dict[str, HostParts], block: int, to: Rows, values: str, supers: str, factors: Factors
) -> None:
    """Scales or mins of some rows, transposed; in the format's own types."""
    if supers in blocks:
        assert factors.supers is not None
        blocks[values].put(block, to, factors.values.T, axis=1)
        blocks[supers].put(block, to, factors.supers.T, axis=1)
    else:
        blocks[values].put(block, to, factors.flat().T, axis=1)


def _indices(rows: Rows, N: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The rows that an index of a `Part` names, of N."""
    return np.arange(N)[rows] if isinstance(rows, slice) else rows


def _as_slice(rows: np.ndarray[Any, np.dtype[np.int64]]) -> Rows:
    """Neighbouring rows as a slice, which numpy reads in place."""
    if bool((np.diff(rows) == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows
