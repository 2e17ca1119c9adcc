"""A llama of two layers with random weights, as a GGUF file that every part of the engine takes: loads in no time.

Its vocabulary is GPT-2's byte alphabet, a few merges and three control tokens; its chat template is ChatML.
"""

from pathlib import Path

import gguf
import numpy as np

VOCAB_MERGES = ("Ġ t", "h e", "Ġt he", "Ġ a", "i n", "r e", "o n", "e r", "Ġ s", "a t")
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Settings, as TOML, of an engine with three programs, so that a start takes seconds. Tests that start their own take
# these, and so share what is compiled.
SMALL_ENGINE = """
[model]
max_model_len = 64
[cache]
num_pages = 32
[scheduler]
max_num_seqs = 2
max_num_batched_tokens = 32
[compile]
decode_rows = [2]
prefill_tokens = [32]
score_tokens = 32
"""


def write_tiny_llama(
    path: Path,
    *,
    architecture: str = "llama",
    context_length: int = 256,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0,
    width: int = 64,
    embedding_scale: float = 1.0,
    heads: tuple[int, int] = (4, 2),
    layers: int = 2,
    seed: int = 0,
) -> Path:
    """Writes the model to `path`: D=`width`, (N, K)=`heads`, H=D/N, F=2·D, `layers` layers; matrices of type `kind`.

    At an `embedding_scale` of 1 the model repeats its last token; the smaller, the more its answers depend on the
    whole context.
    """
    D, (N, K), L = width, heads, layers
    H, F = D // N, 2 * D
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(context_length)
    writer.add_embedding_length(D)
    writer.add_block_count(L)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_rope_dimension_count(H)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    V = add_tokenizer(writer)

    def matrix(name: str, rows: int, columns: int, scale: float) -> None:
        values = rng.normal(0, scale, (rows, columns)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", rng.uniform(0.8, 1.2, D).astype(np.float32))

    matrix("token_embd", V, D, embedding_scale)
    norm("output_norm")
    for layer in range(L):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
        for name, rows, columns in (
            ("attn_q", N * H, D),
            ("attn_k", K * H, D),
            ("attn_v", K * H, D),
            ("attn_output", D, N * H),
            ("ffn_gate", F, D),
            ("ffn_up", F, D),
            ("ffn_down", D, F),
        ):
            matrix(f"{block}.{name}", rows, columns, 1.5 / np.sqrt(columns))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter) -> int:
    """Adds the vocabulary; returns its size."""
    alphabet = [char for _, char in sorted(_byte_alphabet().items())]
    tokens = [*CONTROL, *alphabet, *(merge.replace(" ", "") for merge in VOCAB_MERGES)]
    types = [gguf.TokenType.CONTROL] * len(CONTROL) + [gguf.TokenType.NORMAL] * (len(tokens) - len(CONTROL))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(list(VOCAB_MERGES))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    return len(tokens)


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
