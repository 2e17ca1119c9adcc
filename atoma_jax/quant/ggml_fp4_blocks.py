"""The bit layouts of ggml's MXFP4 and NVFP4 blocks, from bytes to codes and scales.

Their numbers are E2M1 floats (0, ½, 1, 1½, 2, 3, 4, 6 and their negatives). ggml's table holds them doubled, to make
them whole, and its scales halved; so does this module. As in ggml, no scale is a NaN: E8M0's 255 is an exponent like
others, UE4M3's 127 is 0.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, arithmetic: ggml-quants.c and ggml-impl.h
beside it, formats: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf.
"""

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from atoma_jax.quant.ggml_blocks import Parts, nibbles

_Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
_Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

FP4_TABLE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _halved_ue4m3(scales: _Bytes) -> _Floats:
    """Half of each byte as an unsigned E4M3 float. ggml looks at the uppermost bit only to tell a NaN, which is 0."""
    halved = (scales & 127).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    halved *= 0.5
    halved[scales == 127] = 0
    halved[scales == 255] = 240  # as the arithmetic goes: (1 + 7/8) · 2^8 · ½
    return halved


def mxfp4(blocks: _Bytes) -> Parts:
    """2^(e − 128) · table[q]."""
    return Parts(nibbles(blocks[..., 1:17]), np.ldexp(np.float32(1), blocks[..., 0].astype(np.int32) - 128))


def nvfp4(blocks: _Bytes) -> Parts:
    """d/2 · table[q] for four groups of sixteen."""
    packed = blocks[..., 4:36].reshape(*blocks.shape[:-1], 4, 8)
    return Parts(nibbles(packed), _halved_ue4m3(blocks[..., 0:4]))
