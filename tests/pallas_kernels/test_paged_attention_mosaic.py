"""Prefill by the kernel of Mosaic GPU equals attention in float64, as its interpreter runs it; when it is chosen."""

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
    ("heads", "kv_dtype", "changed"),
    [
        (Heads(8, 2, 128, 16), "int8", {}),
        (Heads(8, 2, 128, 16), "float32", {}),
        (Heads(8, 2, 96, 16), "bfloat16", {}),
        (Heads(8, 2, 128, 4), "bfloat16", {}),
        (Heads(8, 2, 128, 256), "bfloat16", {}),  # more than a block of the context
        (Heads(256, 1, 128, 16), "bfloat16", {}),
        (Heads(8, 2, 128, 16), "bfloat16", {"rows": 64}),
        (Heads(8, 2, 128, 16), "bfloat16", {"span": 32}),
        (Heads(8, 2, 128, 16), "bfloat16", {"span": 512}),
        (Heads(8, 2, 128, 16), "bfloat16", {"warps": 8}),
        (Heads(8, 2, 128, 16), "bfloat16", {"stages": 1}),
    ],
)
def test_what_it_does_not_have_is_refused_with_its_sizes(heads: Heads, kv_dtype: str, changed: dict[str, int]) -> None:
    pages = jax.eval_shape(lambda: empty_pages((2, 4, heads.K, heads.S, heads.H), kv_dtype, as_bits=False))
    tiles = paged_attention_mosaic.tiles_that_fit(heads.H)
    good = jax.eval_shape(lambda: empty_pages((2, 4, 2, 16, 128), "bfloat16", as_bits=False))
    assert paged_attention_mosaic.takes(good, 8, 32, tiles)
    assert not paged_attention_mosaic.takes(good, 8, 31, tiles)
    tiles = replace(tiles, **changed)
    assert not paged_attention_mosaic.takes(pages, heads.N, 64, tiles)
    i32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    out = jax.ShapeDtypeStruct((64, heads.N, heads.H), jnp.float32)
    qkv = jax.ShapeDtypeStruct((64, heads.N + 2 * heads.K, heads.H), jnp.float32)
    attend = partial(paged_attention_mosaic.ragged_attention, tiles=tiles, scale=1.0, softcap=None)
    what = {"layer": i32(()), "page_table": i32((2, 4)), "window": i32(())}
    with pytest.raises(
        ValueError, match=rf"64 tokens, {heads.N // heads.K} query heads a kv head, pages .*kernel='mosaic'"
    ):
        jax.eval_shape(attend, qkv, pages, attention_work.QueryBlocks(i32(()), *[i32((4,))] * 4), out, **what)


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
