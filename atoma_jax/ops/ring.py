"""Products of tokens that are cut over devices, while these tokens, or sums of them, go round in a ring.

An exchange in front of a product has every device wait, and hold all tokens. In a ring each multiplies the tokens that
it has while it sends them on and the next ones come, so that sending hides behind multiplying ("Overlap communication
with dependent computation via decomposition", doi:10.1145/3567955.3567959). Weights are read once for each part of the
tokens. Products know nothing of this; they may not exchange anything themselves, as each device is at other tokens. All
of this runs under `shard_map`.

A barrier ends each hop. Without it XLA joins products that share a weight, and sends tokens on before it multiplies the
first: everything would wait for exchanges, and be whole again.
"""

from collections.abc import Callable
from typing import TypeAlias

from jax import lax
from jaxtyping import Array, Float, Float32, Shaped

from sharding.collectives import part_index, pass_on, size_of
from sharding.mesh import MeshShape

# Numbers of a stream for each of `parts²`, from which on its tokens go round. A hop takes its time whatever it carries,
# and there are `parts - 1` for each product: they pay where they carry enough (docs/decisions/007-sharding.md).
RING_NUMBERS = 1 << 19

Product: TypeAlias = Callable[[Shaped[Array, "*part"]], Float32[Array, "t N"]]


def goes_round(tokens: int, width: int, mesh: MeshShape | None, *axes: str) -> bool:
    """Whether products of so many tokens of a stream of such a width, cut over some axes, are made in a ring."""
    parts = size_of(mesh, *axes)
    return parts > 1 and tokens * width >= RING_NUMBERS * parts**2


def joined_products(x: Float[Array, "t K"], product: Product, mesh: MeshShape | None) -> Float32[Array, "T N"]:
    """`product` of all tokens, of which each device along `tensor` has a part."""
    parts, own = size_of(mesh, "tensor"), part_index(mesh, "tensor")
    joined = None
    for hop in range(parts):
        following = pass_on(x, mesh, "tensor") if hop < parts - 1 else x
        y = product(x)  # of the part of the device that is `hop` before this one
        joined = lax.empty((parts, *y.shape), y.dtype) if joined is None else joined
        joined = lax.dynamic_update_index_in_dim(joined, y, (own - hop) % parts, 0)
        x, joined = lax.optimization_barrier((following, joined))
    assert joined is not None
    return joined.reshape(-1, joined.shape[-1])


def summed_products(
    x: Shaped[Array, "parts *part"], product: Product, mesh: MeshShape | None, *axes: str
) -> Float32[Array, "t N"]:
    """The sum of `product` over all devices along some axes, of this device's part; each has an `x` of all parts."""
    parts, own = size_of(mesh, *axes), part_index(mesh, *axes)

    def at(hop: int) -> Float32[Array, "t N"]:
        return product(lax.dynamic_index_in_dim(x, (own - 1 - hop) % parts, keepdims=False))

    sums = at(0)  # of the part of the device before this one: each comes home in the end
    for hop in range(1, parts):
        x, sums = lax.optimization_barrier((x, sums))
        sums = pass_on(sums, mesh, *axes) + at(hop)
    return sums


def summed_nets(x: Float[Array, "t D"], net: Product, mesh: MeshShape | None) -> Float32[Array, "t D"]:
    """The sum of `net` over all devices along `tensor`, of this device's part of the tokens, which goes round too."""
    parts, own, sums = size_of(mesh, "tensor"), x, None
    x = pass_on(x, mesh, "tensor")  # its own part comes last, so that its sum is at home then
    for hop in range(1, parts + 1):
        following = pass_on(x, mesh, "tensor") if hop < parts - 1 else own
        sums = net(x) if sums is None else pass_on(sums, mesh, "tensor") + net(x)
        x, sums = lax.optimization_barrier((following, sums))
    assert sums is not None
    return sums
