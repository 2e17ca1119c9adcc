"""Tiles come from what was measured on a device, and from stated defaults elsewhere."""

import json
from importlib import resources
from pathlib import Path

import pytest

from pallas_kernels import tuning
from pallas_kernels.tuning import (
    AttentionTiles,
    MatmulTiles,
    attention_key,
    attention_tiles,
    default_attention_tiles,
    default_tiles,
    matmul_key,
    matmul_tiles,
)

SHAPE = {"N": 4096, "K": 4096, "bits": 4, "group": 32}


def test_an_unknown_device_and_shape_get_the_defaults():
    assert matmul_tiles("", "planar_matmul", M=1, **SHAPE) == default_tiles("planar_matmul", M=1, **SHAPE)
    assert matmul_tiles("No Such GPU", "planar_matmul", M=1, **SHAPE) == default_tiles("planar_matmul", M=1, **SHAPE)


def test_what_was_measured_counts_for_its_bucket_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    best = {"block_n": 32, "block_m": 16, "splits": 1, "warps": 2, "stages": 5}
    (tmp_path / "tuned").mkdir()
    key = matmul_key(M=8, **SHAPE)
    file = tmp_path / "tuned" / "nvidia-h200-141gb.json"
    file.write_text(json.dumps({"planar_matmul": {key: best}}), encoding="utf-8")
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    device = "NVIDIA H200 (141GB)"
    for rows in (2, 5, 8):
        assert matmul_tiles(device, "planar_matmul", M=rows, **SHAPE) == MatmulTiles(**best)
    assert matmul_tiles(device, "planar_matmul", M=9, **SHAPE) == default_tiles("planar_matmul", M=9, **SHAPE)
    assert matmul_tiles(device, "ternary_matmul", M=8, **SHAPE) == default_tiles("ternary_matmul", M=8, **SHAPE)
    tuning._tuned.cache_clear()


def test_nothing_is_tuned_while_serving(monkeypatch: pytest.MonkeyPatch):
    """A shape that nobody measured gets its default at once, each time: without a device, a file or a clock."""
    known = matmul_tiles("NVIDIA H200", "planar_matmul", M=1, **SHAPE)  # the file of a device is read once

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("no tiles are looked for here")

    for name in ("open", "write_text", "write_bytes", "mkdir"):
        monkeypatch.setattr(Path, name, refused)
    monkeypatch.setattr("jax.devices", refused)
    for name in ("time", "perf_counter", "monotonic"):
        monkeypatch.setattr(f"time.{name}", refused)
    unknown = SHAPE | {"N": 4099}
    for _ in range(2):
        assert matmul_tiles("NVIDIA H200", "planar_matmul", M=1, **SHAPE) == known
        assert matmul_tiles("NVIDIA H200", "planar_matmul", M=1, **unknown) == default_tiles(
            "planar_matmul", M=1, **unknown, device="NVIDIA H200"
        )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"block_n": 48}, "MatmulTiles.block_n must be a power of two, got 48"),
        ({"turn": 384}, "MatmulTiles.turn must be a power of two, got 384"),
        ({"splits": 0}, "MatmulTiles.splits must be at least 1, got 0"),
    ],
)
def test_sizes_that_no_kernel_has_are_refused_by_name(wrong: dict[str, int], says: str):
    good = {"block_n": 32, "block_m": 16, "splits": 3, "warps": 2, "stages": 5}
    MatmulTiles(**good)
    with pytest.raises(ValueError, match=says):
        MatmulTiles(**(good | wrong))


def test_so_are_those_of_attention():
    with pytest.raises(ValueError, match=r"AttentionTiles\.rows must be a power of two, got 24"):
        AttentionTiles(rows=24, span=32, warps=4, stages=2)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("M", [1, 16, 17, 64, 65, 4096])
def test_default_tiles_leave_room_in_shared_memory_and_are_powers_of_two(M, bits):
    tiles = default_tiles("planar_matmul", M=M, N=4096, K=4096, bits=bits, group=4096 if bits == 2 else 128)
    block_k = 64 * 16 // bits
    loads = tiles.block_m * block_k * 2 + tiles.block_n * block_k * bits // 8
    assert tiles.stages * loads <= 163 << 10  # of an A100
    assert tiles.stages >= 2
    for size in (tiles.block_n, tiles.block_m, tiles.splits, tiles.warps):
        assert size & (size - 1) == 0


def test_few_out_features_are_spread_by_cutting_k():
    few = default_tiles("planar_matmul", M=1, N=1024, K=8192, bits=4, group=32)
    many = default_tiles("planar_matmul", M=1, N=65536, K=8192, bits=4, group=32)
    assert few.splits > many.splits == 1


@pytest.mark.parametrize(("bits", "rows"), [(2, 32), (4, 64), (8, 128), (16, 128)])
def test_a_gpu_whose_sums_lie_in_tensor_memory_gets_tiles_that_fit(bits, rows):
    """512 columns: as many as a tile has rows, for each number of a word."""
    operation = "dense_matmul" if bits == 16 else "planar_matmul"
    shape = {"M": 512, "N": 4096, "K": 4096, "bits": bits, "group": 32}
    for device in ("NVIDIA B200", "NVIDIA GB200", "NVIDIA GB300"):
        assert matmul_tiles(device, operation, **shape).block_m == rows
    assert {matmul_tiles(device, operation, **shape).block_m for device in ("", "NVIDIA H200")} == {128}


def test_attention_gets_what_was_measured_for_a_cache_and_heads_like_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    best = {"rows": 16, "span": 128, "warps": 4, "stages": 5}
    (tmp_path / "tuned").mkdir()
    key = attention_key(group=4, head_dim=128, kv_dtype="float8_e4m3fn")
    file = tmp_path / "tuned" / "some-gpu.json"
    file.write_text(json.dumps({"paged_attention_decode": {key: best}}), encoding="utf-8")
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    shape = {"group": 4, "head_dim": 128, "operand_bytes": 2}
    found = attention_tiles("Some GPU", "paged_attention_decode", **shape, kv_dtype="float8_e4m3fn")
    assert found == AttentionTiles(**best)
    default = default_attention_tiles("paged_attention_decode", **shape)
    assert attention_tiles("Some GPU", "paged_attention_decode", **shape, kv_dtype="bfloat16") == default != found
    tuning._tuned.cache_clear()


@pytest.mark.parametrize(
    ("device", "wide"),
    [("NVIDIA H200", True), ("NVIDIA GH200 480GB", True), ("NVIDIA A100-SXM4-80GB", False), ("NVIDIA L40S", False)],
)
def test_gpus_without_warp_groups_get_tiles_that_their_registers_hold(device: str, wide: bool):
    tiles = matmul_tiles(device, "planar_matmul", M=128, N=2048, K=2048, bits=4, group=32)
    assert (tiles.block_n, tiles.block_m) == ((128, 128) if wide else (64, 64))
    sizes = {"group": 3, "head_dim": 128, "operand_bytes": 2}
    assert default_attention_tiles("paged_attention_prefill", **sizes, device=device).rows == (128 if wide else 64)


def test_an_h100_takes_what_was_measured_on_an_h200():
    """Their multiprocessors are the same."""
    measured = resources.files("pallas_kernels") / "tuned" / tuning.tuned_file("NVIDIA H200")
    assert tuning._tuned("NVIDIA H200") == tuning._tuned("NVIDIA H100 80GB HBM3") == json.loads(measured.read_text())
    assert tuning._tuned("NVIDIA A100-SXM4-80GB") == tuning._tuned("") == {}


@pytest.mark.parametrize(("group", "head_dim", "operand_bytes"), [(1, 64, 2), (4, 128, 2), (7, 80, 2), (2, 256, 4)])
def test_tiles_of_attention_hold_a_group_and_are_powers_of_two(group, head_dim, operand_bytes):
    for operation in ("paged_attention_decode", "paged_attention_prefill"):
        tiles = default_attention_tiles(operation, group=group, head_dim=head_dim, operand_bytes=operand_bytes)
        assert tiles.rows >= max(16, group)
        for size in (tiles.rows, tiles.span, tiles.warps):
            assert size & (size - 1) == 0
