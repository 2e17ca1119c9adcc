"""`bench/roofline.py`: limits from bytes and products, and what a file's header says of both."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from atoma_jax.native.build import BuildError, compiler
from bench.roofline import Gauge, ModelCost, Peaks, limits

PEAKS = Peaks(bytes_per_s=1e9, products_per_s=1e11)
COST = ModelCost(step_bytes=10**8, token_products=150 * 10**6, head_products=50 * 10**6)
SIZES = {"prefill_tokens": 512, "decode": (16, 128), "num_seqs": 100, "prompt_tokens": 1, "output_tokens": 1}


def test_one_sequence_is_limited_by_memory_and_many_by_products() -> None:
    found = limits(COST, PEAKS, **SIZES)
    assert found["decode"] == pytest.approx(10)  # 10^8 bytes take 100 ms, 2 · 10^8 products 2 ms
    assert found["batch_decode"] == pytest.approx(500)  # a hundred sequences' products take 200 ms
    assert found["prefill"] == pytest.approx(512 / ((512 * 0.15 + 0.05) / 100))  # the head once
    assert found["batch"] == pytest.approx(500)  # the step that reads the prompts is the only one


def test_a_prompt_counts_with_the_steps_behind_it() -> None:
    found = limits(COST, PEAKS, **SIZES | {"num_seqs": 2, "prompt_tokens": 1000, "output_tokens": 11})
    assert found["batch"] == pytest.approx(2 * 11 / (2000 * 0.0015 + 2 * 0.0005 + 10 * 0.1))


def test_attention_multiplies_and_reads_what_tokens_see() -> None:
    cost = dataclasses.replace(COST, seen_products=10**6, seen_bytes=10**6)
    found = limits(cost, PEAKS, **SIZES)
    pairs = sum(range(1, 513))
    assert found["prefill"] == pytest.approx(512 / ((512 * 0.15 + 0.05 + pairs * 1e-3) / 100))
    assert found["decode"] == pytest.approx(1 / (0.1 + 80e-3))  # 16 + 128 / 2 tokens of 10^6 bytes
    assert found["batch_decode"] == pytest.approx(100 / (0.1 + 0.15))


def test_a_window_bounds_what_tokens_see() -> None:
    cost = dataclasses.replace(COST, seen_products=10**6, seen_bytes=10**6, window=5)
    found = limits(cost, PEAKS, **SIZES)
    pairs = sum(min(seen, 5) for seen in range(1, 513))
    assert found["prefill"] == pytest.approx(512 / ((512 * 0.15 + 0.05 + pairs * 1e-3) / 100))
    assert found["decode"] == pytest.approx(1 / 0.105)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_what_a_header_says(tmp_path: Path, tied: bool, fused: bool) -> None:
    """A head of its own leaves the embedding out; heads are found in projections that are joined, too."""
    gguf = pytest.importorskip("gguf")
    from atoma_jax.loading.gguf.file import GGUFFile

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    writer.add_sliding_window(512)
    writer.add_tensor("token_embd.weight", np.zeros((64, 32), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(32, np.float32))
    widths = {"qkv": 96} if fused else {"q": 64, "k": 16, "v": 16}
    for name, width in widths.items():
        writer.add_tensor(f"blk.0.attn_{name}.weight", np.zeros((width, 32), np.float16))
    writer.add_tensor("blk.0.attn_output.weight", np.zeros((32, 64), np.float16))
    if not tied:
        writer.add_tensor("output.weight", np.zeros((64, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        found = ModelCost.of(file)
    products = 96 * 32 + 32 * 64
    assert found == ModelCost(
        step_bytes=32 * 4 + products * 2 + 64 * 32 * (4 if tied else 2),
        token_products=products,
        head_products=2048,
        seen_products=2 * 64,
        seen_bytes=2 * 2 * 16,
        window=512,
    )


def test_several_measurements_are_averaged() -> None:
    once, again = Peaks(bytes_per_s=1e9, products_per_s=3e11), Peaks(bytes_per_s=3e9, products_per_s=1e11)
    assert Peaks.mean([once, again]) == Peaks(bytes_per_s=2e9, products_per_s=2e11)


@pytest.mark.slow
def test_the_machine_is_measured(tmp_path: Path) -> None:
    try:
        compiler()
    except BuildError as error:
        pytest.skip(str(error))
    gauge = Gauge(1, tmp_path)
    peaks = Peaks.mean([gauge.measure(), gauge.measure()])
    assert 1e8 < peaks.bytes_per_s < 1e13
    assert 1e8 < peaks.products_per_s < 1e14
