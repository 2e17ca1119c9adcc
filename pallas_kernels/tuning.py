"""Sizes of the tiles that kernels work in: measured ones, where `tuned/` has them for a device, else stated defaults.

Nothing is measured while serving: `bench/tune/` writes the files. A file is named after a device and holds, by
operation and by the key of a shape, what was fastest there.
"""

import functools
import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

DENSE_BLOCK = 64  # inputs of bfloat16 weights in one turn: what one request of the matrix units' tiles swizzles
SCALED_WEIGHTS = 16  # rows of a tile from which on packed weights are scaled instead of sums
TOGETHER = 128  # inputs of one product of the matrix units there
ROW_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # measured at; a call takes the next one up


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulTiles:
    """How a product is cut. Outputs are tiles of `block_n` out-features × `block_m` rows."""

    block_n: int
    block_m: int
    splits: int  # of K; their sums are added afterwards
    warps: int
    stages: int  # of loads that are under way
    turn: int = 512  # inputs of packed weights that a turn of few rows takes, at least a block of words

    def __post_init__(self) -> None:
        _check_sizes(self, ("block_n", "block_m", "turn"), ("splits", "warps", "stages"))


def matmul_key(*, M: int, N: int, K: int, bits: int, group: int) -> str:
    """A shape's key: rows by bucket, the rest as it is."""
    rows = next((bucket for bucket in ROW_BUCKETS if bucket >= M), ROW_BUCKETS[-1])
    return f"rows {rows}, N {N}, K {K}, bits {bits}, group {group}"


def matmul_tiles(device: str, operation: str, *, M: int, N: int, K: int, bits: int, group: int) -> MatmulTiles:
    """Tiles of a product of M rows with a weight `[N, K]`.

    Args:
        device: its kind, as JAX calls it.
        operation: the kernel.
        M: rows.
        N: out-features.
        K: inputs.
        bits: of a code; 16: bfloat16.
        group: inputs that share a scale; without effect for bfloat16.
    """
    key = matmul_key(M=M, N=N, K=K, bits=bits, group=group)
    found = _tuned(device).get(operation, {}).get(key)
    if found is not None:
        return MatmulTiles(**found)
    return default_tiles(operation, M=M, N=N, K=K, bits=bits, group=group, device=device)


def default_tiles(operation: str, *, M: int, N: int, K: int, bits: int, group: int, device: str = "") -> MatmulTiles:
    """Tiles of shapes that nobody measured. Few rows: small tiles, and K cut until all of a large GPU has work.

    From what compiles without spills, and what was fastest on an H100 or H200 at the shapes that were measured. Many
    rows take wider tiles, as each unpacks its weights once for all of them.
    """
    # Of words, with the widest plane that the group allows.
    block_k = DENSE_BLOCK if bits == 16 else min(64, group) * 16 // bits
    programs, turn = _PROGRAMS, 512
    if M <= _FEW_ROWS and operation.startswith("planar"):
        # Such a tile has more columns than rows: two for each span of a turn.
        block_n, block_m, warps, programs = 32, 1 << (M - 1).bit_length(), 2, 4 * _PROGRAMS
        # What there are columns for. More in a turn was slower on an H200: Q4_K took 37 µs instead of 30.
        turn = max(block_k, min(turn, _SPANS // block_m * min(group, block_k)))
    elif M <= 16:
        block_n, block_m, warps, programs = 64, 16, 4, 2 * _PROGRAMS
    elif bits == 16 and M > 64:
        block_n, block_m, warps = 256, 128, 8
    else:
        widest = 64 if block_k > 256 else 128
        if bits < 16 and _HAS_TENSOR_MEMORY.search(device):
            widest = min(widest, _TENSOR_MEMORY * bits // 16)  # sums of each plane, as many rows wide
        block_n, block_m, warps = 128, min(widest, 32 if M <= 32 else 64 if M <= 64 else 128), 8
        if operation.startswith("planar") and block_m >= 64 and not _has_warp_groups(device):
            block_n = block_m = 64
    of_x, of_weight = block_m * block_k * (1 if operation == "ternary_matmul" else 2), block_n * block_k * bits // 8
    unpacks = operation.startswith("planar") and block_m >= SCALED_WEIGHTS
    kept = 2 * TOGETHER * block_n if unpacks else 0  # of weights
    stages = max(2, min(4 if bits == 16 or M > 64 else 3, (_SHARED_MEMORY - kept) // (of_x + of_weight)))
    if operation == "planar_grouped_matmul":  # its blocks of rows are many already
        return MatmulTiles(block_n=block_n, block_m=block_m, splits=1, warps=warps, stages=stages, turn=turn)
    blocks = -(-N // block_n) * -(-M // block_m)
    splits = 1
    while splits < 16 and blocks * splits < programs and K // (2 * splits) >= _SHORTEST_SPLIT:
        splits *= 2
    return MatmulTiles(block_n=block_n, block_m=block_m, splits=splits, warps=warps, stages=stages, turn=turn)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTiles:
    """How attention is cut. A tile of queries walks a context block by block."""

    rows: int  # of a tile: pairs of a token and a query head of one kv head's group
    span: int  # tokens of context in a block
    warps: int
    stages: int  # of loads that are under way
    kernel: Literal["triton", "mosaic"] = "triton"  # whose it is: prefill has one of each

    def __post_init__(self) -> None:
        _check_sizes(self, ("rows", "span"), ("warps", "stages"))


def attention_key(*, group: int, head_dim: int, kv_dtype: str) -> str:
    """A model's key."""
    return f"group {group}, head dim {head_dim}, {kv_dtype}"


def attention_tiles(
    device: str, operation: str, *, group: int, head_dim: int, kv_dtype: str, operand_bytes: int
) -> AttentionTiles:
    """Tiles of attention over a paged cache.

    Args:
        device: as in `matmul_tiles`, like the kernel.
        operation: likewise.
        group: query heads of a kv head.
        head_dim: of K and V.
        kv_dtype: of the cache's codes, as numpy calls it.
        operand_bytes: of one number as it is multiplied.
    """
    found = _tuned(device).get(operation, {}).get(attention_key(group=group, head_dim=head_dim, kv_dtype=kv_dtype))
    if found is not None:
        return AttentionTiles(**found)
    return default_attention_tiles(
        operation, group=group, head_dim=head_dim, operand_bytes=operand_bytes, device=device
    )


def default_attention_tiles(
    operation: str, *, group: int, head_dim: int, operand_bytes: int, device: str = ""
) -> AttentionTiles:
    """Tiles that fit the shared memory and the registers of every GPU since sm_80, head dims up to 256."""
    width = _power_of_2(head_dim)
    span = max(16, min(64, _CONTEXT_TILE // (width * operand_bytes)))
    if operation == "paged_attention_decode":
        return AttentionTiles(rows=max(_FEWEST_ROWS, _power_of_2(group)), span=span, warps=4, stages=3)
    # Operands twice the size also take twice the registers for each number, three products being one.
    rows = max(_FEWEST_ROWS, min(128, _PREFILL_TILE // (width * (operand_bytes // 2) ** 2)), _power_of_2(group))
    if not _has_warp_groups(device) and rows > 64 >= group:
        return AttentionTiles(rows=64, span=span, warps=8, stages=3)
    return AttentionTiles(rows=rows, span=span, warps=8, stages=2 if width > 128 else 3)


def _check_sizes(tiles: MatmulTiles | AttentionTiles, powers: tuple[str, ...], counts: tuple[str, ...]) -> None:
    """Raises ValueError for sizes that no kernel has: Triton's tiles are powers of two."""
    for name in (*powers, *counts):
        size = getattr(tiles, name)
        if size < 1 or (name in powers and size != _power_of_2(size)):
            what = "a power of two" if name in powers else "at least 1"
            raise ValueError(f"{type(tiles).__name__}.{name} must be {what}, got {size}")


def _has_warp_groups(device: str) -> bool:
    """Whether four warps multiply together, as since Hopper: others have too few registers for wide tiles."""
    return not device or re.search(r"\bG?[HB]\d{2,3}\b", device) is not None


def _power_of_2(n: int) -> int:
    """The next one."""
    return 1 << (n - 1).bit_length()


_PREFILL_TILE = 128 * 128  # elements of a block's queries, where they are of two bytes
_FEWEST_ROWS = 16  # that tensor cores take
_CONTEXT_TILE = 64 * 128 * 2  # bytes of K multiplied at once, as many of V; several such reads are in flight

_SHARED_MEMORY = 160 << 10  # bytes that the loads under way may take: an A100 has 163 KiB
# Where sums lie in a memory of the matrix units, Triton gives each plane of a word columns of its own. Half of the 512,
# as weights take some too, and what does not fit does not compile.
_HAS_TENSOR_MEMORY = re.compile(r"\bG?B[123]00\b")
_TENSOR_MEMORY = 256
_PROGRAMS = 200  # of a product, at least: one and a half for each multiprocessor of an H200
_SPANS = 8  # that have columns where there is one row
_FEW_ROWS = 4  # up to which sums of packed weights are scaled: of eight, scaling weights takes fewer operations
_SHORTEST_SPLIT = 512  # inputs: a shorter loop would not fill its pipeline
# GPUs with the same multiprocessors as one that was measured.
_LIKE = ((re.compile(r"\bG?H[12]00\b"), "NVIDIA H200"),)


def tuned_file(device: str) -> str:
    """What the file of a device is called."""
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


@functools.cache
def _tuned(device: str) -> dict[str, dict[str, dict[str, Any]]]:
    """What was measured on a device, or on its like; nothing where nobody did."""
    folder = resources.files("pallas_kernels") / "tuned"
    alike = [like for pattern, like in _LIKE if pattern.search(device)]
    for name in (device, *alike) if device else ():
        file = folder / tuned_file(name)
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    return {}
