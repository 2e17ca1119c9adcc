"""The one place that chooses a kernel: by platform, by the weight's layout, by shape.

Models call these functions and know no kernel. Where `Backend.kernels` asks for native kernels, they do attention, draw
tokens, add up logprobs, normalize, rotate and gate rows, and multiply dense weights and those in tiles; where it asks
for Pallas, its kernels do attention and multiply weights in the planar layout and stacks of bfloat16 matrices. The rest
is XLA's everywhere.
"""

from atoma_jax.native.sampling import draw as native_draw
from atoma_jax.native.sampling import survey as native_survey
from atoma_jax.native.tiles import put_codes, put_factors
from atoma_jax.ops.attention import AttentionBatch, Chunks, attend, attention_batch, empty_pages
from atoma_jax.ops.backend import Backend, Kernels, Platform, has_native_kernels
from atoma_jax.ops.experts import grouped_feed_forward
from atoma_jax.ops.kernel_linear import PACKED_ROWS
from atoma_jax.ops.linear import layer_of, linear
from atoma_jax.ops.pending import Added, Normed, computed, norm_in_front
from atoma_jax.ops.residual import all_tokens, own_tokens, rows_of
from atoma_jax.ops.rowwise import gated, rms_norm, rotated_heads
from atoma_jax.ops.stream import linear_of_parts, linear_of_stream, net_of_stream
from pallas_kernels.kv_pages import KVPages
from pallas_kernels.quantized_matmul import pack_planar

# Types and packings of the kernels that others need come from here: nobody else imports kernels.
__all__ = [
    "PACKED_ROWS",
    "Added",
    "AttentionBatch",
    "Backend",
    "Chunks",
    "KVPages",
    "Kernels",
    "Normed",
    "Platform",
    "all_tokens",
    "attend",
    "attention_batch",
    "computed",
    "empty_pages",
    "gated",
    "grouped_feed_forward",
    "has_native_kernels",
    "layer_of",
    "linear",
    "linear_of_parts",
    "linear_of_stream",
    "native_draw",
    "native_survey",
    "net_of_stream",
    "norm_in_front",
    "own_tokens",
    "pack_planar",
    "put_codes",
    "put_factors",
    "rms_norm",
    "rotated_heads",
    "rows_of",
]
