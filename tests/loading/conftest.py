"""Tiny models: GGUF files with one thing changed, written by the `gguf` package, and folders in HF layout."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy

Q = gguf.GGMLQuantizationType


@dataclass(kw_only=True)
class TinyModel:
    """What goes into a file: L = 2, D = 256, N = 4, K = 2, H = 64, F = 512, V = 40; changes win, None leaves out.

    Matrices hold random blocks of their type with scales around 1: values that no quantizer would choose.
    """

    arch: str = "llama"
    metadata: Mapping[str, Any] = field(default_factory=dict)  # keys behind "{arch}."
    tensors: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)  # shapes
    types: Callable[[str], gguf.GGMLQuantizationType] = lambda name: Q.Q4_0

    def all_metadata(self) -> dict[str, Any]:
        keys = {
            "block_count": 2,
            "context_length": 128,
            "embedding_length": 256,
            "feed_forward_length": 512,
            "attention.head_count": 4,
            "attention.head_count_kv": 2,
            "attention.layer_norm_rms_epsilon": 1e-5,
        }
        return {**keys, **self.metadata}

    def all_tensors(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...] | None] = {"token_embd.weight": (40, 256), "output_norm.weight": (256,)}
        for layer in range(2):
            block = {"attn_norm": (256,), "attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256)}
            block |= {"attn_output": (256, 256), "ffn_norm": (256,)}
            block |= {"ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}
            shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
        return {name: shape for name, shape in {**shapes, **self.tensors}.items() if shape is not None}

    def write(self, path: Path) -> dict[str, np.ndarray]:
        """Writes the file; the exact values of its tensors, from the `gguf` package."""
        writer = gguf.GGUFWriter(path, self.arch)
        for key, value in self.all_metadata().items():
            if value is not None:
                add = {
                    int: writer.add_uint32,
                    float: writer.add_float32,
                    str: writer.add_string,
                    list: writer.add_array,
                    bool: writer.add_bool,
                }
                add[type(value)](f"{self.arch}.{key}", value)
        rng = np.random.default_rng(1)
        exact = {}
        for name, shape in self.all_tensors().items():
            kind = self.types(name) if len(shape) == 2 else Q.F32
            raw = random_rows(shape, kind, rng)
            writer.add_tensor(name, raw, raw_dtype=kind)
            exact[name] = gguf.quants.dequantize(raw, kind).reshape(shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return exact


def random_rows(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    if kind in (Q.F32, Q.F16, Q.BF16):
        return gguf.quants.quantize(rng.standard_normal(shape).astype(np.float32), kind)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // elements, size), np.uint8)
    offset = {Q.Q6_K: 208, Q.TQ2_0: 64}.get(kind, 0)
    halves = 2 if kind in (Q.Q4_1, Q.Q5_1, Q.Q4_K, Q.Q5_K) else 1
    scales = rng.uniform(0.5, 2, (len(blocks), halves)) * rng.choice([-1, 1], (len(blocks), halves))
    blocks[:, offset : offset + 2 * halves] = scales.astype(np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


@pytest.fixture
def tiny_model() -> type[TinyModel]:
    return TinyModel


@pytest.fixture
def hf_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder in HF layout, weights by the `safetensors` package: its path."""

    def write(tensors: Mapping[str, np.ndarray], quantization: object = None, **config: object) -> Path:
        if quantization is not None:
            config["quantization_config"] = quantization
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        contiguous = {name: np.asarray(values, order="C") for name, values in tensors.items()}
        safetensors.numpy.save_file(contiguous, tmp_path / "model.safetensors")
        return tmp_path

    return write
