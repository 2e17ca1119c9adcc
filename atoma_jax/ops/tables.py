"""Tables of a vocabulary, one row a token: look-up, and logits. Both know that rows may be cut over devices.

How rows lie in a table is the layout's, and products are `ops.linear`'s.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from atoma_jax.native import matmul as native_matmul
from atoma_jax.ops.backend import Backend
from atoma_jax.ops.linear import linear
from atoma_jax.ops.parts import from_all_rows, own_rows
from atoma_jax.ops.pending import Normed, computed
from atoma_jax.ops.residual import is_cut
from atoma_jax.ops.ring import goes_round, summed_products
from atoma_jax.quant.qtensor import QTensor
from pallas_kernels import quantized_matmul as matmul_kernels
from sharding.collectives import join_over, part_index, size_of, swap_cut


def embed(ids: Int32[Array, " T"], table: QTensor | Array, backend: Backend) -> Float32[Array, "t D"]:
    """Rows of a table `[V, D]`, which may be cut along V: of the tokens that this device has of the stream."""
    mesh = backend.mesh
    if size_of(mesh, "tensor", "fsdp") == 1:
        return _rows(ids, table)
    rows = own_rows(ids, table, mesh)

    def look_up(rows: Int32[Array, " n"]) -> Float32[Array, "n D"]:
        return jnp.where((rows >= 0)[:, None], _rows(jnp.maximum(rows, 0), table), 0.0)

    T, D, tensor = ids.shape[0], table.shape[1], size_of(mesh, "tensor")
    if goes_round(rows.shape[0], D, mesh, "fsdp", "tensor") and (tensor == 1 or is_cut(T, mesh)):
        return summed_products(rows.reshape(-1, T // tensor), look_up, mesh, "fsdp", "tensor")
    return from_all_rows(look_up(rows), mesh)


def _rows(ids: Int32[Array, " T"], table: QTensor | Array) -> Float32[Array, "T D"]:
    if not isinstance(table, QTensor):
        return table[ids].astype(jnp.float32)
    assert table.permutation is None, "no format permutes an embedding"
    if table.layout == "tiles":
        return native_matmul.rows(ids, table, jnp.int32(0))
    if table.layout == "rows":
        return matmul_kernels.dequantize(
            table.codes[ids], table.scales[ids], None if table.mins is None else table.mins[ids]
        )

    def factors(values: Array, supers: Array | None) -> Array:
        picked = None if supers is None else supers[:, ids]
        return matmul_kernels.flat_factors(values[:, ids], picked).T  # [T, G]

    codes = matmul_kernels.unpack_planar(table.codes[ids], table.bits, table.plane)
    codes = codes.reshape(ids.shape[0], table.scales.shape[0], -1)  # [T, G, g]
    mins = None if table.mins is None else factors(table.mins, table.min_supers)
    scales = factors(table.scales, table.scale_supers)
    return matmul_kernels.dequantize(codes, scales, mins, zero=table.zero, table=table.table)


def logits(x: Float[Array, "B D"] | Normed, table: QTensor | Array, backend: Backend) -> Float32[Array, "B V"]:
    """x · tableᵀ; of the device's part of the vocabulary where it is cut over `tensor`.

    Along `fsdp` rows go to the parts of the table, not the table to the rows: they are fewer.
    """
    mesh = backend.mesh
    if backend.multiplies_alone:
        return linear(x, table, backend)
    rows = join_over(computed(x, backend), mesh, "fsdp", 0)
    return swap_cut(linear(rows, table, backend), mesh, "fsdp", cut=0, join=1)


def without_filling(scores: Float32[Array, "B V"], vocab_size: int, backend: Backend) -> Float32[Array, "B V"]:
    """Logits with −inf for rows that fill a table up to what devices divide: no sampler chooses them."""
    V = scores.shape[1]
    if size_of(backend.mesh, "tensor") * V == vocab_size or backend.mesh is None:
        return scores
    ids = part_index(backend.mesh, "tensor") * V + jnp.arange(V, dtype=jnp.int32)
    return jnp.where(ids < vocab_size, scores, -jnp.inf)
