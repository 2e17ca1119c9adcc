"""Prefill by the kernel of Mosaic GPU, interpreted, equals attention in float64:

    python -m tests.pallas_kernels.interpreted_mosaic CASE

Run by test_paged_attention_mosaic.py in a process of its own: groups of warps are threads that wait for one another,
and XLA has as many threads as CPU devices or processors, of which there may be fewer than it takes. Products of
registers are not interpreted: the compile gate alone has those.
"""

import os
import sys
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

# Not at the top: JAX reads what was set above when it is imported.
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels import attention_work, paged_attention, paged_attention_mosaic
from pallas_kernels.kv_pages import write_kv
from tests.pallas_kernels.contexts import LAYER, Heads
from tests.pallas_kernels.test_paged_attention_mosaic import CASES

HOPPER = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
# A copy from behind an array's end brings zeros on a GPU. Here it brings NaN, which must not get anywhere either.
# Accesses to memory that no barrier orders fail.
INTERPRETER: dict[str, Any] = {"out_of_bounds_reads": "uninitialized", "detect_races": True}


def program(heads: Heads, softcap: float | None, span: int, stages: int):
    """A step of one layer, as `Step.run` takes it; the twin decodes."""
    tiles = replace(paged_attention_mosaic.tiles_that_fit(heads.H), span=span, stages=stages)
    interpret = mosaic_gpu.InterpretGPUParams(**INTERPRETER)

    @jax.jit
    def run(q, k, v, pages, page, slot, table, lengths, chunks, window):
        pages = write_kv(pages, k, v, layer=jnp.int32(LAYER), page=page, slot=slot)
        what = {"layer": jnp.int32(LAYER), "page_table": table, "window": window}
        what |= {"scale": heads.H**-0.5, "softcap": softcap}
        rows, qkv = table.shape[0], jnp.concatenate([q, k, v], axis=1)
        decoded = paged_attention.decode_attention(q[:rows], pages, lengths=lengths, **what)
        out = jnp.full(q.shape, jnp.nan, jnp.float32)
        out = out.at[:rows].set(jnp.where((lengths > 0)[:, None, None], decoded, out[:rows]))
        size = tiles.rows // (heads.N // heads.K)
        blocks = attention_work.padded_query_blocks(*chunks, lengths, q.shape[0], size=size)
        out = paged_attention_mosaic.ragged_attention(qkv, pages, blocks, out, tiles, **what, interpret=interpret)
        return out, pages

    def on_hopper(*arguments):
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=HOPPER)):
            return run(*arguments)

    return on_hopper


def check(case: str) -> None:
    """Raises AssertionError where a step of this case comes out wrong."""
    heads, kv_dtype, softcap, span, stages, steps = CASES[case]
    run = program(heads, softcap, span, stages)
    for make, window in steps:
        step = make(heads, kv_dtype, as_bits=False)
        out, pages = step.run(run, step.contexts.pages(), window)
        step.check(out, pages, window=window, softcap=softcap)


if __name__ == "__main__":
    check(sys.argv[1])
    print("right")
