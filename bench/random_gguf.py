"""Writes a GGUF file of a llama's shape with random weights, and with the tokenizer of a real model.

`python -m bench.random_gguf r1b.gguf` makes what `bench.compare` can run where no model of that size is at hand:
speed asks for shapes and types, not for answers.
"""

from pathlib import Path
from typing import Annotated

import gguf
import numpy as np
import typer

from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.quant.ggml_types import GGMLType
from atoma_jax.quant.quantizers import quantize

SAMPLE_ROWS = 64  # that are quantized, and repeated: what a row holds does not change how long it takes


def main(
    path: Annotated[Path, typer.Argument(help="The file to write.")],
    type_name: Annotated[str, typer.Option("--type", help="ggml type of all matrices, such as Q4_K.")] = "Q4_K",
    tokenizer: Annotated[str, typer.Option(help="GGUF model that lends its tokenizer.")] = "smollm2-135m-instruct",
    layers: int = 16,
    dim: int = 2048,
    ffn: int = 8192,
    heads: int = 32,
    kv_heads: int = 8,
) -> None:
    """Write a model; by default of Llama-3.2-1B's shape, with its table of the vocabulary tied to the head."""
    reader = gguf.GGUFReader(resolve(tokenizer).path)
    kind = GGMLType[type_name]
    vocab, kv_dim = len(reader.fields["tokenizer.ggml.tokens"].data), dim // heads * kv_heads
    inner = {
        "attn_norm": (dim,),
        "attn_q": (dim, dim),
        "attn_k": (kv_dim, dim),
        "attn_v": (kv_dim, dim),
        "attn_output": (dim, dim),
        "ffn_norm": (dim,),
        "ffn_gate": (ffn, dim),
        "ffn_up": (ffn, dim),
        "ffn_down": (dim, ffn),
    }
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            item = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=item)
    writer.add_context_length(8192)
    writer.add_embedding_length(dim)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(dim // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab, dim), "output_norm": (dim,)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(layers) for name, shape in inner.items()}
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
            continue
        values = rng.standard_normal((SAMPLE_ROWS, shape[1]), np.float32) * np.float32(shape[1] ** -0.5)
        sample = quantize(values, kind)
        rows = np.resize(sample, (shape[0], sample.shape[1]))
        writer.add_tensor(f"{name}.weight", rows, raw_dtype=gguf.GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    typer.run(main)
