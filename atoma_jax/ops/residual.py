"""The residual stream of a step, whose tokens are cut over `tensor` where a step has many.

In front of a layer's products each device needs all tokens, behind them each has a part of every sum. What lies
between products (the stream itself, its norms) is the same everywhere; cut, each device holds and computes its share
("Reducing Activation Recomputation in Large Transformer Models", arXiv:2205.05198). A sum over devices is
then a sum that is cut and, behind the norm, a join: no more bytes, and fewer where products take bfloat16. All of this
runs under `shard_map`; where nothing is cut, nothing happens.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from sharding.collectives import join_over, part_index, size_of, sum_and_cut, sum_over
from sharding.mesh import MeshShape

# Fewest tokens of a step that are cut. With fewer, what an exchange takes beside its bytes outweighs the bytes that are
# saved, as a sum that is cut and joined is two of them: with 10 µs and NVLink, below 730 tokens of width 4096.
CUT_TOKENS = 1024


def is_cut(tokens: int, mesh: MeshShape | None) -> bool:
    """Whether a step of so many tokens cuts its stream."""
    parts = size_of(mesh, "tensor")
    return parts > 1 and tokens >= CUT_TOKENS and tokens % parts == 0


def own_tokens(x: Shaped[Array, "T *n"], mesh: MeshShape | None) -> Shaped[Array, "t *n"]:
    """This device's part of what every device has of all tokens."""
    tokens = x.shape[0]
    if not is_cut(tokens, mesh):
        return x
    parts = size_of(mesh, "tensor")
    return x.reshape(parts, tokens // parts, *x.shape[1:])[part_index(mesh, "tensor")]


def all_tokens(x: Shaped[Array, "t *n"], tokens: int, mesh: MeshShape | None) -> Shaped[Array, "T *n"]:
    """All `tokens` of the stream, of which this device may have a part."""
    return x if x.shape[0] == tokens else join_over(x, mesh, "tensor", 0)


def sum_of_parts(x: Float32[Array, "T D"], mesh: MeshShape | None, *others: str) -> Float32[Array, "t D"]:
    """The sums over `tensor`, and over other axes of the mesh, that go into the stream: of this device's tokens."""
    if not is_cut(x.shape[0], mesh):
        return sum_over(x, mesh, "tensor", *others)
    return sum_over(sum_and_cut(x, mesh, "tensor", 0), mesh, *others)


def rows_of(
    x: Float[Array, "t D"], token: Int32[Array, " Q"], tokens: int, mesh: MeshShape | None
) -> Float[Array, "Q D"]:
    """The stream of some of a step's `tokens`, on every device; zeros for -1."""
    if not is_cut(tokens, mesh):
        return jnp.where((token >= 0)[:, None], x[jnp.maximum(token, 0)], 0.0)
    own = token - part_index(mesh, "tensor") * x.shape[0]
    here = (own >= 0) & (own < x.shape[0])
    return sum_over(jnp.where(here[:, None], x[jnp.where(here, own, 0)], 0.0), mesh, "tensor")
