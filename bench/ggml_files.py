"""GGUF files of types that `atoma-jax quantize` does not write: blocks by libgguf, as ggml makes them, files by gguf.

Types that want an importance matrix get one that holds every input for equally important, which is worse than a real
one. Both packages are for benchmarks and tests; only `bench/accuracy.py` uses this.
"""

# The library has wheels for some machines only, and has no types.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from pathlib import Path

import gguf
import numpy as np

FALLBACK = gguf.GGMLQuantizationType.IQ4_NL  # llama.cpp's, where rows are no multiple of a block
SMALL_FALLBACK = gguf.GGMLQuantizationType.Q4_0
TIED = gguf.GGMLQuantizationType.Q8_0  # of the embedding, which is the head too: as llama.cpp's mixtures do


def rewrite(source: Path, target: Path, type_name: str) -> None:
    """Writes `target`: the matrices of `source`, a file in F32, as `type_name`; what is no matrix stays.

    Raises:
        ImportError: libgguf is not installed.
    """
    from libgguf import quantize_requires_imatrix, quantize_rows_raw

    def quantized(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        N, K = values.shape
        importance = np.ones(K, np.float32) if quantize_requires_imatrix(int(kind)) else None
        raw = quantize_rows_raw(int(kind), values, N, K, imatrix=importance)
        return np.frombuffer(raw, np.uint8).reshape(N, -1)

    reader = gguf.GGUFReader(source)
    kind = gguf.GGMLQuantizationType[type_name]
    architecture = reader.fields["general.architecture"].contents()
    partial = target.with_suffix(".part")
    writer = gguf.GGUFWriter(partial, architecture)
    own = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type")
    for name, field in reader.fields.items():
        if name not in own:
            inner = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = np.array(tensor.data, np.float32)
        to = type_of(tensor.name, values.shape, kind)
        raw = values if to is None else quantized(values, to)
        writer.add_tensor(tensor.name, raw, raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(target)


def type_of(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType | None:
    """The type of a tensor in a file of `kind`; None: it stays in F32."""
    if len(shape) != 2:
        return None
    if name in ("token_embd.weight", "output.weight"):
        return TIED
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if shape[1] % block == 0:
        return kind
    return FALLBACK if block == 256 else SMALL_FALLBACK
