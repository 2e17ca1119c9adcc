"""`bench/roofline.py`: limits from bytes and products, and what a file's header says of both."""

from pathlib import Path

import numpy as np
import pytest

from atoma_jax.native.build import BuildError, compiler
from bench.roofline import Gauge, Peaks, Weight, limits

PEAKS = Peaks(bytes_per_s=1e9, products_per_s=1e11)
WEIGHT = Weight(step_bytes=10**8, token_products=150 * 10**6, head_products=50 * 10**6)


def test_one_sequence_is_limited_by_memory_and_many_by_products() -> None:
    found = limits(WEIGHT, PEAKS, prefill_tokens=512, num_seqs=100, prompt_tokens=1, output_tokens=1)
    assert found["decode"] == pytest.approx(10)  # 10^8 bytes take 100 ms, 2 · 10^8 products 2 ms
    assert found["batch_decode"] == pytest.approx(500)  # a hundred sequences' products take 200 ms
    assert found["prefill"] == pytest.approx(512 / ((512 * 0.15 + 0.05) / 100))  # the head once
    assert found["batch"] == pytest.approx(500)  # the step that reads the prompts is the only one


def test_a_prompt_counts_with_the_steps_behind_it() -> None:
    found = limits(WEIGHT, PEAKS, prefill_tokens=1, num_seqs=2, prompt_tokens=1000, output_tokens=11)
    assert found["batch"] == pytest.approx(2 * 11 / (2000 * 0.0015 + 2 * 0.0005 + 10 * 0.1))


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_leaves_the_embedding_out(tmp_path: Path, tied: bool) -> None:
    gguf = pytest.importorskip("gguf")
    from atoma_jax.loading.gguf.file import GGUFFile

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((64, 32), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(32, np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((32, 32), np.float16))
    if not tied:
        writer.add_tensor("output.weight", np.zeros((64, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        found = Weight.of(file)
    head = 64 * 32 * (4 if tied else 2)
    assert found == Weight(step_bytes=32 * 4 + 32 * 32 * 2 + head, token_products=1024, head_products=2048)


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
