"""The compile gate's cases of attention over a paged cache and of writing into it, at the shapes of real models."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jaxtyping import Array

from atoma_jax import ops
from bench.compile_gate.cases import KernelCase, Target
from pallas_kernels import kv_pages, paged_attention_mosaic
from pallas_kernels.attention_work import QueryBlocks
from pallas_kernels.tuning import AttentionTiles

LAYERS, PAGES = 4, 4096  # more change nothing but the width of addresses: these caches are beyond 32 bits
ROWS, WIDTH = 64, 512  # sequences, pages of a page table
PREFILL = 2048  # tokens
BACKEND = ops.Backend(platform="cuda", operands="bfloat16", weight_layout="planar", kernels="pallas")

# Query heads, kv heads, head dim, softcap.
MODELS: dict[str, tuple[int, int, int, float | None]] = {
    "Llama-3.1-8B": (32, 8, 128, None),
    "Qwen3-0.6B": (16, 8, 128, None),
    "Gemma 3 4B": (8, 4, 256, None),  # its window is an operand
    "Gemma 2 9B": (16, 8, 256, 50.0),
    "BitNet 2B4T": (20, 5, 128, None),
    "G 7, H 80": (14, 2, 80, None),
    "H 64": (32, 8, 64, None),
}


def case(
    model: str,
    tokens: int,
    *,
    kv_dtype: str = "bfloat16",
    page_size: int = 16,
    quick: bool = False,
    targets: tuple[Target, ...] = ("h200", "a100", "b200"),
) -> KernelCase:
    """Attention of a step of one layer; `tokens` beyond `ROWS`: it prefills too. The write of K and V is part of it."""
    N, K, H, softcap = MODELS[model]
    pages = jax.eval_shape(
        partial(kv_pages.empty_pages, (LAYERS, PAGES * 128 // page_size, K, page_size, H), kv_dtype, as_bits=False)
    )
    i32, f32 = partial(ShapeDtypeStruct, dtype=jnp.int32), partial(ShapeDtypeStruct, dtype=jnp.float32)
    inputs = f32((tokens, N, H)), f32((tokens, K, H)), f32((tokens, K, H)), pages
    places = i32((tokens,)), i32((tokens,)), i32((ROWS, WIDTH)), i32((ROWS,)), i32((3, ROWS)), i32(()), i32(())
    prefills = tokens > ROWS
    return KernelCase(
        name=f"attention, {model}, {kv_dtype}, pages of {page_size}, {'prefill' if prefills else 'decode'}",
        kernel="^paged_attention_prefill" if prefills else "^paged_attention_(decode|combine)",
        function=partial(_attention, prefills=prefills, scale=H**-0.5, softcap=softcap),
        arguments=(*inputs, *places),
        quick=quick,
        targets=targets,
    )


def _attention(
    q: Array,
    k: Array,
    v: Array,
    pages: ops.KVPages,
    page: Array,
    slot: Array,
    table: Array,
    lengths: Array,
    chunks: Array,
    layer: Array,
    window: Array,
    *,
    prefills: bool,
    scale: float,
    softcap: float | None,
    device: str,
) -> Any:
    backend = replace(BACKEND, device=device)
    batch = ops.attention_batch(
        pages,
        q.shape[1],
        backend,
        page=page,
        slot=slot,
        page_table=table,
        decode_lengths=lengths,
        chunks=ops.Chunks(chunks[0], chunks[1], chunks[2]) if prefills else None,
        fixed_parts=False,
    )
    what: dict[str, Any] = {"layer": layer, "window": window, "scale": scale, "softcap": softcap}
    out, pages = ops.attend(q, k, v, pages, batch, backend, **what)
    return ops.computed(out, backend), pages


def write_case(kv_dtype: str, *, quick: bool = False, targets: tuple[Target, ...] = ("h200", "a100", "b200")) -> Any:
    """The write of K and V alone, of Llama-3.1-8B's size: of a step that prefills, as others write where they read."""
    whole = case("Llama-3.1-8B", PREFILL, kv_dtype=kv_dtype)
    return KernelCase(
        name=f"KV write, {kv_dtype}",
        kernel="^write_kv",
        function=whole.function,
        arguments=whole.arguments,
        quick=quick,
        targets=targets,
    )


def mosaic_case(model: str, *, kv_dtype: str = "bfloat16", page_size: int = 16, quick: bool = False) -> KernelCase:
    """Prefill by the kernel of Mosaic GPU alone, as only a device's tuned tiles take it."""
    N, K, H, softcap = MODELS[model]
    pages = jax.eval_shape(
        partial(kv_pages.empty_pages, (LAYERS, PAGES * 128 // page_size, K, page_size, H), kv_dtype, as_bits=False)
    )
    i32, f32 = partial(ShapeDtypeStruct, dtype=jnp.int32), partial(ShapeDtypeStruct, dtype=jnp.float32)
    tiles = paged_attention_mosaic.tiles_that_fit(H)
    of_blocks: list[Any] = [i32((PREFILL * (N // K) // tiles.rows + ROWS,))] * 4
    used: Any = i32(())
    return KernelCase(
        name=f"attention, {model}, {kv_dtype}, pages of {page_size}, prefill by Mosaic GPU",
        kernel="_mosaic_gpu_kernel$",  # with JAX 0.10 by no other name
        function=partial(_by_mosaic, tiles=tiles, scale=H**-0.5, softcap=softcap),
        arguments=(
            *(f32((PREFILL, N + 2 * K, H)), pages, QueryBlocks(used, *of_blocks), f32((PREFILL, N, H))),
            *(i32((ROWS, WIDTH)), i32(()), i32(())),
        ),
        quick=quick,
        targets=("h200",),
    )


def _by_mosaic(
    qkv: Array,
    pages: ops.KVPages,
    blocks: QueryBlocks,
    out: Array,
    table: Array,
    layer: Array,
    window: Array,
    *,
    tiles: AttentionTiles,
    scale: float,
    softcap: float | None,
    device: str,
) -> Array:
    del device  # Mosaic GPU asks JAX for it
    what: dict[str, Any] = {"layer": layer, "window": window, "scale": scale, "softcap": softcap}
    return paged_attention_mosaic.ragged_attention(qkv, pages, blocks, out, tiles, page_table=table, **what)


SINCE_HOPPER: tuple[Target, ...] = ("h200", "b200")  # Triton has no fp8 for sm_80
CASES = [
    *(case(model, tokens, quick=model == "Llama-3.1-8B") for model in MODELS for tokens in (ROWS, PREFILL)),
    *(case("Llama-3.1-8B", tokens, page_size=64) for tokens in (ROWS, PREFILL)),
    *(case(model, tokens, kv_dtype="int8") for model in ("Llama-3.1-8B", "Gemma 3 4B") for tokens in (ROWS, PREFILL)),
    *(
        case(model, tokens, kv_dtype="fp8_e4m3", targets=SINCE_HOPPER)
        for model in ("Llama-3.1-8B", "Gemma 3 4B")
        for tokens in (ROWS, PREFILL)
    ),
    *(
        case(model, tokens, kv_dtype="float32")
        for model in ("Llama-3.1-8B", "Gemma 3 4B")
        for tokens in (ROWS, PREFILL)
    ),
    *(case("Llama-3.1-8B", tokens, kv_dtype="float16") for tokens in (ROWS, PREFILL)),
    *(
        mosaic_case(model, quick=model == "Llama-3.1-8B")
        for model in ("Llama-3.1-8B", "Qwen3-0.6B", "Gemma 3 4B", "Gemma 2 9B", "H 64")
    ),
    mosaic_case("Llama-3.1-8B", page_size=64),
    mosaic_case("Llama-3.1-8B", kv_dtype="float16"),
    *(write_case(kv_dtype, quick=kv_dtype == "int8") for kv_dtype in ("float32", "bfloat16", "float16", "int8")),
    write_case("fp8_e4m3", targets=SINCE_HOPPER),
]
