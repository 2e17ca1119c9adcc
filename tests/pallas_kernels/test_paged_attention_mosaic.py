"""Prefill by the kernel of Mosaic GPU equals attention in float64, as its interpreter runs it; when it is chosen."""

import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from atoma_jax import ops
from pallas_kernels import attention_work, paged_attention_mosaic, tuning
from pallas_kernels.kv_pages import empty_pages
from tests.pallas_kernels.contexts import NO_WINDOW, Heads
from tests.pallas_kernels.steps import behind_long_contexts, mixed

# Heads, cache, softcap, span, stages, and steps with their windows.
CASES = {
    "H 128": (Heads(8, 2, 128, 16), "bfloat16", None, 128, 2, [(behind_long_contexts, NO_WINDOW)]),
    "seven heads a kv head": (Heads(7, 1, 64, 32), "float16", 1.5, 64, 2, [(mixed, 37)]),
    "a head a kv head": (
        *(Heads(2, 2, 64, 64), "bfloat16", None, 64, 3),
        [(mixed, NO_WINDOW), (behind_long_contexts, 170)],
    ),
    "H 256": (Heads(2, 1, 256, 8), "bfloat16", None, 64, 2, [(behind_long_contexts, 170)]),
}


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter of JAX 0.10 knows no transposed operands")
@pytest.mark.parametrize("case", CASES)
def test_steps_are_right_with_and_without_a_window(case: str) -> None:
    command = [sys.executable, "-m", "tests.pallas_kernels.interpreted_mosaic", case]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "right"


@pytest.mark.parametrize(
    ("heads", "kv_dtype", "changed", "says"),
    [
        (Heads(8, 2, 128, 16), "int8", {}, "a cache of int8, must be bfloat16 or float16"),
        (Heads(8, 2, 128, 16), "float32", {}, "a cache of float32, must be bfloat16 or float16"),
        (Heads(8, 2, 96, 16), "bfloat16", {}, "a head dim of 96, must be a multiple of 64 up to 256"),
        (Heads(8, 2, 128, 4), "bfloat16", {}, "pages of 4 tokens, must be a multiple of 8"),
        (Heads(8, 2, 128, 256), "bfloat16", {}, "pages of 256 tokens, must divide tiles.span, 128"),
        (Heads(256, 1, 128, 16), "bfloat16", {}, "256 query heads a kv head, must be at most 128"),
        (Heads(2, 2, 128, 16), "bfloat16", {}, "steps of 64 tokens, must be at least the 128 of a block"),
        (Heads(8, 2, 128, 16), "bfloat16", {"rows": 64}, "tiles.rows 64, must be 128"),
        (Heads(8, 2, 128, 16), "bfloat16", {"span": 32}, "tiles.span 32, must be a multiple of 64 up to 256"),
        (Heads(8, 2, 128, 16), "bfloat16", {"span": 512}, "tiles.span 512, must be a multiple of 64 up to 256"),
        (Heads(8, 2, 128, 16), "bfloat16", {"warps": 8}, "tiles.warps 8, must be 12"),
        (Heads(8, 2, 128, 16), "bfloat16", {"stages": 1}, "tiles.stages 1, must be at least 2"),
    ],
)
def test_what_it_does_not_have_is_refused_by_name(
    heads: Heads, kv_dtype: str, changed: dict[str, int], says: str
) -> None:
    T, tiles = 64, replace(paged_attention_mosaic.tiles_that_fit(heads.H), **changed)
    pages = jax.eval_shape(lambda: empty_pages((2, 4, heads.K, heads.S, heads.H), kv_dtype, as_bits=False))
    i32, f32 = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.int32, jnp.float32))
    attend = partial(paged_attention_mosaic.ragged_attention, tiles=tiles, scale=1.0, softcap=None)
    blocks = attention_work.QueryBlocks(i32(()), *[i32((4,))] * 4)
    qkv, out = f32((T, heads.N + 2 * heads.K, heads.H)), f32((T, heads.N, heads.H))
    what = {"layer": i32(()), "page_table": i32((2, 4)), "window": i32(())}
    with pytest.raises(ValueError, match=re.escape(says)):
        jax.eval_shape(attend, qkv, pages, blocks, out, **what)


def test_a_device_whose_tiles_say_so_takes_it_where_pages_and_steps_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = asdict(paged_attention_mosaic.tiles_that_fit(128))
    tuned = {"NVIDIA H200": {"paged_attention_prefill": {"group 4, head dim 128, bfloat16": measured}}}
    monkeypatch.setattr(tuning, "_tuned", lambda device: tuned.get(device, {}))
    N, K, H, rows = 8, 2, 128, 4
    i32, f32 = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.int32, jnp.float32))

    def is_by_triton(page_size: int, T: int, device: str, kernels: ops.Kernels = "pallas") -> bool:
        """Whether a step that prefills has Triton's kernel for that."""
        backend = ops.Backend(
            platform="cuda", operands="bfloat16", weight_layout="planar", kernels=kernels, device=device
        )

        def attend(q, k, v, pages, page, slot, table, lengths, chunks, layer):
            where = {"page": page, "slot": slot, "page_table": table, "decode_lengths": lengths}
            chunks = ops.Chunks(*chunks)
            batch = ops.attention_batch(pages, N, backend, **where, chunks=chunks, fixed_parts=False)
            what = {"layer": layer, "window": layer, "scale": 1.0, "softcap": None}
            return ops.attend(q, k, v, pages, batch, backend, **what)

        pages = jax.eval_shape(lambda: empty_pages((2, 4, K, page_size, H), "bfloat16", as_bits=False))
        new = f32((T, N, H)), f32((T, K, H)), f32((T, K, H))
        places = i32((T,)), i32((T,)), i32((rows, 8)), i32((rows,)), i32((3, rows)), i32(())
        found = jax.make_jaxpr(attend)(*new, pages, *places).jaxpr.eqns
        [kind] = [one.primitive.name for one in found if one.params.get("name") == "paged_attention_prefill"]
        return kind == "pallas_call"

    assert not is_by_triton(16, 64, "NVIDIA H200")
    assert is_by_triton(256, 64, "NVIDIA H200")
    assert is_by_triton(16, 16, "NVIDIA H200")
    assert is_by_triton(16, 64, "NVIDIA A100")
    assert is_by_triton(16, 64, "NVIDIA H200", kernels="interpret")
