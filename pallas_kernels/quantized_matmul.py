"""Products with group-quantized weights, as plain XLA: unpacking, dequantization, matrix product, row look-up.

A weight is `[N, K]`, out-features first as in the files, and equals `scale[n, k // g] * number[n, k] - min[n, k // g]`,
where a number is a code less a zero point, or what a table says for the code. Codes come in one of two layouts:

- rows: int8 `[N, K/g, g]`, a byte a number, or the bits of a float8_e4m3fn as uint8. What XLA:CPU is quick with:
  unpacking fields costs it three to eight times as much as the product itself.
- planar: uint16 words `[N, K·bits/16]`. K is cut into blocks of KB = P·planes, planes = 16/bits. Word j of block b
  holds in bit field i the element b·KB + i·P + j, so that a plane is contiguous in K and a word is as wide as the
  bfloat16 it becomes. What the GPU kernels read.

Which layout and which route a product takes is decided in `atoma_jax/ops`, not here.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, Num, UInt8, UInt16

TILE_ELEMENTS = 1 << 20  # dequantized at once where a weight is larger: 4 MB of float32 stay in a CPU's second cache


def pack_planar(codes: np.ndarray, bits: int, plane: int) -> np.ndarray:
    """Packs unsigned codes `[N, K]` below 2**bits into words `[N, K·bits/16]` with planes of `plane` elements."""
    planes = 16 // bits
    N, K = codes.shape
    assert K % (plane * planes) == 0, (K, plane, planes)
    fields = codes.reshape(N, K // (plane * planes), planes, plane).astype(np.uint16)
    words = np.zeros((N, K // (plane * planes), plane), np.uint16)
    for i in range(planes):
        words |= fields[:, :, i] << np.uint16(bits * i)
    return words.reshape(N, -1)


def unpack_planar(words: UInt16[Array, "*lead W"], bits: int, plane: int) -> UInt16[Array, "*lead K"]:
    """Codes in natural order from `pack_planar`'s words."""
    blocks = words.reshape(*words.shape[:-1], -1, 1, plane)
    shifts = (jnp.arange(16 // bits, dtype=jnp.uint16) * bits)[:, None]
    codes = (blocks >> shifts) & np.uint16(2**bits - 1)  # [*lead, K/KB, planes, P]
    return codes.reshape(*words.shape[:-1], -1)


def flat_factors(values: Num[Array, "G *rest"], supers: Float32[Array, "S *rest"] | None) -> Float32[Array, "G *rest"]:
    """Scales or mins as one float32 a group: themselves, or integers times the float of their supergroup."""
    values = values.astype(jnp.float32)
    if supers is None:
        return values
    return values * jnp.repeat(supers, values.shape[0] // supers.shape[0], axis=0)


def numbers(codes: Array, *, zero: int, table: tuple[int, ...] | None) -> Float32[Array, "..."]:
    """What codes stand for."""
    if codes.dtype == jnp.uint8:
        return from_e4m3(codes)
    if table is not None:
        return jnp.asarray(table, jnp.float32)[codes]
    return codes.astype(jnp.float32) - zero if zero else codes.astype(jnp.float32)


def from_e4m3(bits: UInt8[Array, "*n"]) -> Float32[Array, "*n"]:
    """Numbers from the bits of float8_e4m3fn.

    XLA:CPU converts its own float8 one by one; integers of the same bits go through vectors, ten times as fast.
    """
    wide = bits.astype(jnp.int32)
    magnitude, sign = wide & 127, (wide & 128) << 24
    # Four bits of exponent with a bias of 7 go where eight with one of 127 are. Below them are multiples of 2^-9.
    normal = lax.bitcast_convert_type((magnitude << 20) + ((127 - 7) << 23), jnp.float32)
    value = jnp.where(magnitude < 8, magnitude.astype(jnp.float32) * 2.0**-9, normal)
    value = jnp.where(magnitude == 127, jnp.nan, value)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(value, jnp.int32) | sign, jnp.float32)


def dequantize(
    codes: Array,
    scales: Float[Array, "*lead G"],
    mins: Float[Array, "*lead G"] | None,
    *,
    zero: int = 0,
    table: tuple[int, ...] | None = None,
) -> Float32[Array, "*lead K"]:
    """Weights from codes `[*lead, G, g]` in natural order: `scale·number − min`, in float32."""
    weights = numbers(codes, zero=zero, table=table) * scales[..., None].astype(jnp.float32)
    if mins is not None:
        weights = weights - mins[..., None].astype(jnp.float32)
    return weights.reshape(*codes.shape[:-2], -1)


def matmul_rows(
    x: Float[Array, "T K"],
    codes: Num[Array, "N G g"],
    scales: Float[Array, "N G"],
    mins: Float[Array, "N G"] | None,
    *,
    operands: jnp.dtype,
) -> Float32[Array, "T N"]:
    """x · Wᵀ with W in the rows layout.

    Weights are dequantized to `operands`, in tiles where W is large, multiplied by `x` cast to it, summed in float32.
    """
    T, N = x.shape[0], codes.shape[0]
    x = x.astype(operands)

    def product(codes: Array, scales: Array, mins: Array | None) -> Array:
        return dot(x, dequantize(codes, scales, mins).astype(operands))  # [T, n]

    tiles = -(-codes.size // TILE_ELEMENTS)
    if tiles == 1:
        return product(codes, scales, mins)
    rows = -(-N // tiles)

    def tile(i: Array, y: Array) -> Array:
        # The last tile starts early and repeats some rows: N need not divide, and nothing is padded or copied.
        start = jnp.minimum(i * rows, N - rows)
        part = product(
            lax.dynamic_slice_in_dim(codes, start, rows),
            lax.dynamic_slice_in_dim(scales, start, rows),
            None if mins is None else lax.dynamic_slice_in_dim(mins, start, rows),
        )
        return lax.dynamic_update_slice_in_dim(y, part, start, axis=1)

    return lax.fori_loop(0, tiles, tile, jnp.zeros((T, N), jnp.float32))


def matmul_planar(
    x: Float[Array, "T K"],
    words: UInt16[Array, "N W"],
    scales: Float32[Array, "G N"],
    mins: Float32[Array, "G N"] | None,
    *,
    bits: int,
    plane: int,
    zero: int,
    table: tuple[int, ...] | None,
    operands: jnp.dtype,
) -> Float32[Array, "T N"]:
    """x · Wᵀ with W in the planar layout, whose scales and mins lie `[K/g, N]`: the twin of the Pallas kernel."""
    codes = unpack_planar(words, bits, plane)  # [N, K]
    codes = codes.reshape(codes.shape[0], scales.shape[0], -1)  # [N, G, g]
    weights = dequantize(codes, scales.T, None if mins is None else mins.T, zero=zero, table=table)
    return dot(x.astype(operands), weights.astype(operands))


def quantize_tokens(
    x: Float[Array, "T K"], largest: Float32[Array, "T 1"] | None = None
) -> tuple[Int8[Array, "T K"], Float32[Array, "T 1"]]:
    """Each token as int8 and the factor that undoes it, as BitNet b1.58 does (arXiv:2402.17764).

    A token that holds NaN or infinity gets a factor of NaN: its row shows it, and no other does.

    Args:
        x: tokens, or parts of them.
        largest: magnitude of each whole token, where `x` has parts.
    """
    x = x.astype(jnp.float32)
    if largest is None:
        largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = 127.0 / jnp.maximum(largest, 1e-5)
    codes = jnp.clip(jnp.round(x * scale), -128, 127)  # half to even
    return jnp.where(jnp.isfinite(codes), codes, 0).astype(jnp.int8), jnp.where(
        jnp.isfinite(largest), 1.0 / scale, jnp.nan
    )


def matmul_int8(
    x: Float[Array, "T K"],
    codes: Int8[Array, "N G g"],
    scales: Float32[Array, "N G"],
    mins: Float32[Array, "N G"] | None,
) -> Float32[Array, "T N"]:
    """x · Wᵀ with `x` as int8 for each token and W in the rows layout: exact integer sums within a group."""
    tokens, factor = quantize_tokens(x)
    N, G, g = codes.shape
    by_group = tokens.reshape(-1, G, g)

    def group(i: Array | int) -> Float32[Array, "T N"]:
        mine = lax.dynamic_index_in_dim(by_group, i, 1, keepdims=False)  # [T, g]
        theirs = lax.dynamic_index_in_dim(codes, i, 1, keepdims=False)  # [N, g]
        sums = lax.dot_general(mine, theirs, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        part = sums.astype(jnp.float32) * lax.dynamic_index_in_dim(scales, i, 1, keepdims=False)
        if mins is None:
            return part
        totals = jnp.sum(mine, axis=1, dtype=jnp.int32).astype(jnp.float32)[:, None]  # [T, 1]
        return part - totals * lax.dynamic_index_in_dim(mins, i, 1, keepdims=False)

    if G == 1:
        return group(0) * factor
    empty = jnp.zeros((x.shape[0], N), jnp.float32)
    return lax.fori_loop(0, G, lambda i, y: y + group(i), empty) * factor


def dot(x: Float[Array, "T K"], weights: Float[Array, "N K"]) -> Float32[Array, "T N"]:
    """x · Wᵀ, summed in float32."""
    return lax.dot_general(x, weights, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
