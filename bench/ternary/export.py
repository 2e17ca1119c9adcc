"""Writes the trained model as a Hugging Face BitNet folder and as a GGUF file that hold the same weights, bit by bit.

Owns freezing (codes, one scale a matrix, what else is rounded) and both layouts. Every number that is written is exact
in bfloat16 and in float16, so that neither file rounds what the other keeps.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from jaxtyping import Float32, Int8, UInt8
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from bench.ternary.model import EMBEDDING, OUTPUT_NORM, SMALLEST, Shape
from bench.ternary.text import BOS, BOS_ID, EOS, EOS_ID

# Which graph computes this model, by `general.architecture`:
# - "bitnet-b1.58" (microsoft/BitNet's llama.cpp, and the files published under that name): sub-norms before attn_output
#   and ffn_down, NeoX rotation, relu(gate)² · up, tied embeddings. Exactly what is trained here.
# - "bitnet" (llama.cpp): the same, but silu(gate) · up, unless a recent reader finds `bitnet.hidden_activation` and
#   knows its value: a file under this name is silently wrong in every older reader.
ARCHITECTURE = "bitnet-b1.58"
NAME = "atoma-jax ternary test model"
PRE_TOKENIZER = "gpt-2"
DESCRIPTION = "A test model of bible English for weight formats; no benchmark of ternary quality."
LICENSE = "CC0-1.0"

_FILE_NAMES = {
    EMBEDDING: "token_embd.weight",
    OUTPUT_NORM: "output_norm.weight",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}

_ROWS_A_BYTE = 4  # of a packed matrix: byte row r holds rows r, r + M/4, r + M/2, r + 3M/4, lowest bits first
_SHARED_MANTISSA = ml_dtypes.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """The weights as they are written, by their names in a Hugging Face folder."""

    codes: dict[str, Int8[np.ndarray, "M N"]]  # −1, 0, 1
    scales: dict[str, np.float32]  # a matrix is code · scale
    dense: dict[str, Float32[np.ndarray, "..."]]  # embedding and norms

    def values(self) -> dict[str, Float32[np.ndarray, "..."]]:
        """All weights as plain numbers."""
        return self.dense | {name: codes * self.scales[name] for name, codes in self.codes.items()}


def freeze(weights: dict[str, np.ndarray], shape: Shape) -> Frozen:
    """Rounds trained weights to what the files can hold. A scale keeps 8 significant bits."""
    codes: dict[str, np.ndarray] = {}
    scales: dict[str, np.float32] = {}
    for name in shape.matrices():
        w = np.asarray(weights[name], np.float32)
        scale = max(np.abs(w).mean(), np.float32(SMALLEST))
        codes[name] = np.clip(np.rint(w / scale), -1, 1).astype(np.int8)
        scales[name] = np.float32(shared_precision(scale))
    dense = {name: shared_precision(weights[name]) for name in (EMBEDDING, *shape.norms())}
    return Frozen(codes=codes, scales=scales, dense=dense)


def shared_precision(values: np.ndarray | np.float32) -> np.ndarray:
    """Rounded to numbers that bfloat16 and float16 both hold: 8 significant bits, on a grid no finer than 2⁻²⁴."""
    coarse = np.asarray(values, np.float32).astype(_SHARED_MANTISSA).astype(np.float16).astype(np.float32)
    assert np.isfinite(coarse).all()
    assert (coarse.astype(_SHARED_MANTISSA).astype(np.float32) == coarse).all()
    return coarse


def pack(codes: Int8[np.ndarray, "M N"]) -> UInt8[np.ndarray, "M/4 N"]:
    """Four rows a byte, as `pack_weights` of transformers does."""
    quarters = (codes + 1).astype(np.uint8).reshape(_ROWS_A_BYTE, -1, codes.shape[1])  # [4, M/4, N]
    return np.bitwise_or.reduce(quarters << np.array([0, 2, 4, 6], np.uint8)[:, None, None], axis=0)


def unpack(packed: UInt8[np.ndarray, "M/4 N"]) -> Int8[np.ndarray, "M N"]:
    """The inverse of `pack`."""
    quarters = (packed >> np.array([0, 2, 4, 6], np.uint8)[:, None, None]) & 3  # [4, M/4, N]
    return quarters.astype(np.int8).reshape(-1, packed.shape[1]) - np.int8(1)


def write_folder(folder: Path, frozen: Frozen, shape: Shape, tokenizer: Tokenizer) -> None:
    """The Hugging Face folder: `transformers` loads it as BitNetForCausalLM."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {name: v.astype(ml_dtypes.bfloat16) for name, v in frozen.dense.items()}
    for name, codes in frozen.codes.items():
        tensors[name] = pack(codes)
        tensors[f"{name}_scale"] = np.array([frozen.scales[name]], ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.context,
    }
    _write_json(folder / "config.json", config_of(shape))
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID})


def config_of(shape: Shape) -> dict[str, Any]:
    """`config.json`. With `autobitlinear`, as in microsoft/bitnet-b1.58-2B-4T, `weight_scale` multiplies."""
    return {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "dtype": "bfloat16",
        "vocab_size": shape.V,
        "hidden_size": shape.D,
        "intermediate_size": shape.F,
        "num_hidden_layers": shape.L,
        "num_attention_heads": shape.N,
        "num_key_value_heads": shape.K,
        "hidden_act": "relu2",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.rms_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": None,
        },
    }


def read_folder(folder: Path) -> tuple[Frozen, Shape, Tokenizer]:
    """What `write_folder` wrote."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        V=config["vocab_size"],
        D=config["hidden_size"],
        F=config["intermediate_size"],
        L=config["num_hidden_layers"],
        N=config["num_attention_heads"],
        K=config["num_key_value_heads"],
        H=config["hidden_size"] // config["num_attention_heads"],
        context=config["max_position_embeddings"],
        rope_theta=config["rope_theta"],
        rms_eps=config["rms_norm_eps"],
    )
    tensors = load_file(folder / "model.safetensors")
    frozen = Frozen(
        codes={name: unpack(tensors[name]) for name in shape.matrices()},
        scales={name: tensors[f"{name}_scale"].astype(np.float32)[0] for name in shape.matrices()},
        dense={name: tensors[name].astype(np.float32) for name in (EMBEDDING, *shape.norms())},
    )
    return frozen, shape, Tokenizer.from_file(str(folder / "tokenizer.json"))


def write_gguf(
    path: Path,
    frozen: Frozen,
    shape: Shape,
    tokenizer: Tokenizer,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.TQ2_0,
) -> None:
    """The GGUF file: matrices as `kind` (TQ2_0 or TQ1_0), embedding (also the output) in F16, norms in F32."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    _write_sizes(writer, shape, kind)
    _write_vocabulary(writer, tokenizer)
    for name, values in frozen.values().items():
        file_name = file_name_of(name)
        if name not in frozen.codes:
            stored = values.astype(np.float16) if name == EMBEDDING else values
            assert (stored.astype(np.float32) == values).all(), name
            writer.add_tensor(file_name, stored)
            continue
        blocks = gguf.quants.quantize(values, kind)
        assert (gguf.quants.dequantize(blocks, kind) == values).all(), name
        writer.add_tensor(file_name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def file_name_of(name: str) -> str:
    """A tensor's name in GGUF; "bitnet" and "bitnet-b1.58" share them."""
    for ours, theirs in _FILE_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _write_sizes(writer: gguf.GGUFWriter, shape: Shape, kind: gguf.GGMLQuantizationType) -> None:
    """What llama.cpp's converters write for this architecture."""
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    writer.add_license(LICENSE)
    writer.add_vocab_size(shape.V)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.D)
    writer.add_block_count(shape.L)
    writer.add_feed_forward_length(shape.F)
    writer.add_head_count(shape.N)
    writer.add_head_count_kv(shape.K)
    writer.add_rope_dimension_count(shape.H)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    """Byte-level BPE: `gpt2` with its merges."""
    model = json.loads(tokenizer.to_str())["model"]
    texts = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(texts)
    writer.add_token_types([special[0] if text in (BOS, EOS) else special[1] for text in texts])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
