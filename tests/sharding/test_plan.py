"""Large models planned over many devices, from headers: the files hold no weights, and nothing is allocated."""

from pathlib import Path
from typing import Any

import gguf
import pytest

from atoma_jax import ModelPlan, plan_model
from atoma_jax.config import CacheConfig, EngineConfig
from atoma_jax.engine.memory import DeviceMemory, plan_pages
from atoma_jax.errors import ConfigError
from sharding.mesh import parse_mesh
from tests.tiny_model import add_tokenizer

GB = 10**9


def write_header(path: Path, *, D: int, F: int, L: int, heads: tuple[int, int], V: int) -> Path:
    """A llama in BF16 without its numbers: the file has a hole where they would be."""
    N, K = heads
    H = D // N
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(D)
    writer.add_block_count(L)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_rope_dimension_count(H)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(V)
    add_tokenizer(writer)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (V, D), "output": (V, D), "output_norm": (D,)}
    for layer in range(L):
        block = f"blk.{layer}"
        shapes |= {f"{block}.attn_norm": (D,), f"{block}.ffn_norm": (D,)}
        shapes |= {f"{block}.attn_q": (N * H, D), f"{block}.attn_k": (K * H, D), f"{block}.attn_v": (K * H, D)}
        shapes |= {f"{block}.attn_output": (D, N * H), f"{block}.ffn_down": (D, F)}
        shapes |= {f"{block}.ffn_gate": (F, D), f"{block}.ffn_up": (F, D)}
    total = 0
    for name, shape in shapes.items():
        dense = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.BF16
        size = (4 if len(shape) == 1 else 2) * shape[0] * (shape[1] if len(shape) > 1 else 1)
        writer.add_tensor_info(f"{name}.weight", list(shape), None, size, raw_dtype=dense)  # pyright: ignore[reportArgumentType]
        total += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    length = -(-path.stat().st_size // 32) * 32 + total
    with path.open("r+b") as file:
        file.truncate(length)
    return path


@pytest.fixture(scope="module")
def twelve_gb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "12gb.gguf"
    return write_header(path, D=4096, F=14336, L=26, heads=(32, 8), V=32000)


@pytest.fixture(scope="module")
def one_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("billion") / "1b.gguf"
    return write_header(path, D=2048, F=8192, L=16, heads=(32, 8), V=128_256)


def planned(path: Path, mesh: str | None, memory: int | None = None) -> ModelPlan:
    options: dict[str, Any] = {"model": str(path), "mesh": mesh, "dtype": "bfloat16", "max_model_len": 2048}
    return plan_model(EngineConfig.from_options(options), memory=memory, platform="cuda", progress=False)


def test_twelve_gigabytes_fit_eight_devices_of_two_and_are_refused_for_four(twelve_gb: Path) -> None:
    assert twelve_gb.stat().st_size > 11.5 * GB
    fits = planned(twelve_gb, "fsdp=8", 2 * GB)
    assert fits.weight_bytes < 1.6 * GB
    assert fits.longest_context is not None
    assert fits.longest_context >= 2048
    assert fits.max_sequences is not None
    assert fits.max_sequences >= 8
    lacks = planned(twelve_gb, "fsdp=4", 2 * GB)
    assert lacks.kv_bytes is not None
    assert lacks.kv_bytes < 0
    assert (lacks.longest_context, lacks.max_sequences) == (0, 0)
    # What an engine asks before it loads anything.
    memory = DeviceMemory(is_cpu=False, free=2 * GB, weights=lacks.weight_bytes)
    page_bytes = lacks.kv_bytes_per_token * 16
    with pytest.raises(ConfigError, match="there is room for 0"):
        plan_pages(CacheConfig(), memory, page_bytes=page_bytes, max_model_len=2048)


@pytest.mark.parametrize("mesh", ["fsdp=8", "tensor=8", "fsdp=2,tensor=4"])
def test_a_device_holds_its_share_of_weights_and_cache(mesh: str, one_billion: Path) -> None:
    whole, part, shape = planned(one_billion, None), planned(one_billion, mesh), parse_mesh(mesh)
    assert part.weight_bytes == pytest.approx(whole.weight_bytes / shape.num_devices, rel=0.05)
    # A token's pages lie on the devices of its slice, and the slices share the tokens.
    assert part.kv_bytes_per_token / shape.num_slices == pytest.approx(whole.kv_bytes_per_token / 8, rel=0.05)


def test_heads_that_do_not_divide_are_on_every_device(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_header(tmp_path / "3.gguf", D=192, F=384, L=2, heads=(3, 3), V=512)
    whole, part = planned(path, None), planned(path, "tensor=2")
    assert "3 heads, 3 of keys and values, do not divide over tensor=2" in caplog.text
    assert part.kv_bytes_per_token == whole.kv_bytes_per_token
    one, other = dict(whole.weights), dict(part.weights)
    assert {name: one[name] // other[name] for name in one} == {
        name: 2 if name.endswith(("embed", "head", "gate_up", "down")) else 1 for name in one
    }
