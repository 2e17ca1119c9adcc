"""Sizes of the tiles that kernels work in: measured ones, where `tuned/` has them for a device, else stated defaults.

Nothing is measured while serving: `bench/tune.py` writes the files. A file is named after a device and holds, by
operation and by the key of a shape, what was fastest there.
"""

import functools
import json
import re
from dataclasses import dataclass
from importlib import resources

DENSE_BLOCK = 64  # inputs of bfloat16 weights in one turn: what one request of the matrix units' tiles swizzles
ROW_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # measured at; a call takes the next one up


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulTiles:
    """How a product is cut. Outputs are tiles of `block_n` out-features × `block_m` rows."""

    block_n: int
    block_m: int
    splits: int  # of K; their sums are added afterwards
    warps: int
    stages: int  # of loads that are under way


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

    From what compiles without spills and keeps two blocks on a multiprocessor; many rows take wider tiles, as each
    unpacks its weights once for all of them.
    """
    # Of words, with the widest plane that the group allows.
    block_k = DENSE_BLOCK if bits == 16 else min(64, group) * 16 // bits
    if M <= 16:
        block_n, block_m, warps = 64, 16, 4
    else:
        widest = 64 if block_k > 256 else 128
        if bits < 16 and _HAS_TENSOR_MEMORY.search(device):
            widest = min(widest, _TENSOR_MEMORY * bits // 16)  # sums of each plane, as many rows wide
        block_n, block_m, warps = 128, min(widest, 32 if M <= 32 else 64 if M <= 64 else 128), 8
    of_x, of_weight = block_m * block_k * (1 if operation == "ternary_matmul" else 2), block_n * block_k * bits // 8
    stages = max(2, min(4, _SHARED_MEMORY // (of_x + of_weight)))
    if operation == "planar_grouped_matmul":  # its blocks of rows are many already
        return MatmulTiles(block_n=block_n, block_m=block_m, splits=1, warps=warps, stages=stages)
    blocks = -(-N // block_n) * -(-M // block_m)
    splits = 1
    while splits < 8 and blocks * splits < _BLOCKS and K // (2 * splits) >= _SHORTEST_SPLIT:
        splits *= 2
    return MatmulTiles(block_n=block_n, block_m=block_m, splits=splits, warps=warps, stages=stages)


_SHARED_MEMORY = 160 << 10  # bytes that the loads under way may take: an A100 has 163 KiB
# Where sums lie in a memory of the matrix units, Triton gives each plane of a word columns of its own. Half of the 512,
# as weights take some too, and what does not fit does not compile.
_HAS_TENSOR_MEMORY = re.compile(r"\bG?B[123]00\b")
_TENSOR_MEMORY = 256
_BLOCKS = 2 * 132  # two for each multiprocessor of an H200
_SHORTEST_SPLIT = 1024  # inputs: a shorter loop would not fill its pipeline


@functools.cache
def _tuned(device: str) -> dict[str, dict[str, dict[str, int]]]:
    """What was measured on a device; nothing where nobody did."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    file = resources.files("pallas_kernels") / "tuned" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if name and file.is_file() else {}
