"""A step's attention by the Pallas kernels, interpreted, equals attention in float64: tokens are written into their
pages, contexts are cut into parts and blocks, and nothing of what the cache holds elsewhere gets in.

A program takes seconds to compile, a step milliseconds: each case is one program, and its steps cover many things."""

import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atoma_jax import ops
from pallas_kernels.kv_pages import write_kv
from tests.pallas_kernels.contexts import LAYER, NO_WINDOW, Contexts, Heads
from tests.pallas_kernels.steps import LONGEST, B, Step, mixed

BACKEND = ops.Backend(platform="cpu", operands="float32", weight_layout="rows", kernels="interpret")
CASES = {
    "three heads a kv head": (Heads(6, 2, 64, 16), "float32", None),
    "seven heads a kv head, H 80": (Heads(7, 1, 80, 8), "bfloat16", None),
    "a head a kv head, H 96, softcap": (Heads(2, 2, 96, 128), "int8", 1.5),
    "fp8 in pages of 32, H 128": (Heads(4, 2, 128, 32), "fp8_e4m3", None),
    "H 256, softcap": (Heads(4, 1, 256, 64), "float16", 1.5),
}


@lru_cache
def program(heads: Heads, softcap: float | None, fixed_parts: bool = False, decode_only: bool = False):
    """A step of one layer: q, k, v of its tokens, the cache, and where everything lies → out and the cache."""

    @jax.jit
    def run(q, k, v, pages, page, slot, table, lengths, chunks, window):
        batch = ops.attention_batch(
            pages,
            heads.N,
            BACKEND,
            page=page,
            slot=slot,
            page_table=table,
            decode_lengths=lengths,
            chunks=None if decode_only else ops.Chunks(*chunks),
            fixed_parts=fixed_parts,
        )
        layer, scale = jnp.int32(LAYER), heads.H**-0.5
        what = {"layer": layer, "window": window, "scale": scale, "softcap": softcap}
        out, pages = ops.attend(q, k, v, pages, batch, BACKEND, **what)
        return ops.computed(out, BACKEND).reshape(q.shape), pages

    return run


@pytest.mark.parametrize("case", CASES)
def test_a_mixed_step_is_right_with_and_without_a_window(case: str) -> None:
    heads, kv_dtype, softcap = CASES[case]
    step = mixed(heads, kv_dtype)
    for window in (NO_WINDOW, 37, 1):
        out, pages = step.run(program(heads, softcap), step.contexts.pages(), window)
        step.check(out, pages, window=window, softcap=softcap)


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_decodes_is_right_and_leaves_the_cache_as_its_twin_does(case: str) -> None:
    """Newest tokens are the first of a page, its last, behind several parts, and none. The cache is the same bit for
    bit, but for page 0. A newest key that is NaN stays in its row and kv head."""
    (heads, kv_dtype, softcap), lengths = CASES[case], [1, 32, 300, 64, 0, 97]
    contexts = Contexts(heads, lengths, kv_dtype, width=LONGEST // heads.S)
    step, run = Step(contexts, lengths, tokens=B), program(heads, softcap, decode_only=True)
    want = jax.jit(write_kv)(contexts.pages(), step.k, step.v, layer=np.int32(LAYER), page=step.page, slot=step.slot)
    out, pages = step.run(run, contexts.pages())
    step.check(out, pages, softcap=softcap)
    for left, right in zip(jax.tree.leaves(want), jax.tree.leaves(pages), strict=True):
        np.testing.assert_array_equal(np.asarray(left)[:, 1:], np.asarray(right)[:, 1:])

    step.k[2, -1, 3] = np.nan
    sick, _ = step.run(run, contexts.pages())
    group = heads.N // heads.K
    assert np.isnan(sick[2, -group:]).all()
    np.testing.assert_array_equal(sick[2, :-group], out[2, :-group])
    np.testing.assert_array_equal(np.delete(sick, 2, 0), np.delete(out, 2, 0))


@pytest.mark.parametrize("kv_dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "fp8_e4m3"])
def test_types_that_a_gpu_keeps_as_they_are_give_the_same_bits(kv_dtype: str) -> None:
    """Of a step that decodes: prefill reads the cache by the same lines."""
    heads, lengths = Heads(2, 1, 64, 32), [1, 33, 300, 64, 0, 96]
    outs: list[np.ndarray] = []
    for as_bits in (True, False):
        contexts = Contexts(heads, lengths, kv_dtype, width=LONGEST // heads.S, as_bits=as_bits)
        step = Step(contexts, lengths, tokens=B)
        out, pages = step.run(program(heads, None, decode_only=True), contexts.pages())
        if as_bits:
            step.check(out, pages)
        outs.append(out)
    np.testing.assert_array_equal(*outs)


def test_steps_of_any_mixture_up_to_the_limits_are_right() -> None:
    heads, kv_dtype, softcap = CASES["three heads a kv head"]
    contexts = Contexts(heads, [128, 384, 16, 2, 384, 17], kv_dtype, width=LONGEST // heads.S)
    for step in (
        Step(contexts, [], [(0, 128)]),  # one prompt that fills the bucket
        Step(contexts, [], [(7, 1)]),  # a single token
        Step(contexts, [128, 384, 16, 2, 384, 17]),  # nothing to prefill
        Step(contexts, [], [(0, 0), (256, 100), (0, 16), (0, 2)]),
        Step(contexts, []),  # no work at all
    ):
        out, pages = step.run(program(heads, softcap), contexts.pages())
        step.check(out, pages)


@pytest.mark.parametrize("fixed_parts", [False, True])
def test_a_step_that_only_decodes(fixed_parts: bool) -> None:
    """Rows without a context yield zeros, wherever they are."""
    heads = Heads(6, 2, 64, 16)
    contexts = Contexts(heads, [1, 300, 128, 2, 384, 15], "float32", width=LONGEST // heads.S)
    run = program(heads, None, fixed_parts, decode_only=True)
    for lengths in ([1, 300, 0, 2, 384, 15], [0, 0, 128, 0, 0, 0], [0] * B):
        step = Step(contexts, lengths, tokens=B)
        for window in (NO_WINDOW, 20):
            out, pages = step.run(run, contexts.pages(), window)
            step.check(out, pages, window=window)


def test_with_fixed_parts_a_row_is_bit_equal_whatever_stands_beside_it() -> None:
    heads = Heads(6, 2, 64, 16)
    contexts = Contexts(heads, [300, 384, 128, 2, 384, 15], "float32", width=LONGEST // heads.S)
    run = program(heads, None, True, decode_only=True)
    alone = Step(contexts, [300, 0, 0, 0, 0, 0], tokens=B).run(run, contexts.pages())[0]
    among = Step(contexts, [300, 384, 128, 2, 384, 15], tokens=B).run(run, contexts.pages())[0]
    np.testing.assert_array_equal(alone[0], among[0])


@pytest.mark.parametrize("case", ["three heads a kv head", "a head a kv head, H 96, softcap"])
def test_nan_in_one_context_stays_in_its_row_and_kv_head(case: str) -> None:
    heads, kv_dtype, softcap = CASES[case]
    step = mixed(heads, kv_dtype)
    run = program(heads, softcap)
    clean, pages = step.run(run, step.contexts.pages())
    page, slot = (part[0] for part in step.contexts.place(2, np.asarray([37])))
    sick = "k" if pages.k_scale is None else "k_scale"
    bad = step.contexts.pages()
    bad = bad._replace(**{sick: getattr(bad, sick).at[LAYER, page, 1, slot].set(jnp.nan)})
    out, _ = step.run(run, bad)
    group = heads.N // heads.K
    assert np.isnan(out[2, group:]).all()
    np.testing.assert_array_equal(out[2, :group], clean[2, :group])
    np.testing.assert_array_equal(np.delete(out, 2, 0), np.delete(clean, 2, 0))


@pytest.mark.slow  # a process that compiles everything anew
def test_kv_heads_may_be_split_over_devices() -> None:
    command = [sys.executable, "-m", "tests.pallas_kernels.sharded_attention"]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["2", "devices,", "equal"]
