"""transformers with torch on the same GPU: Llama-3.1-8B of random weights in bfloat16, eager, as a peer of `engine`."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from bench.gpu_sections.protocol import Context, Measurement

ROWS, CONTEXT, STEPS, PREFILL = (1, 8, 64), 1024, 8, 2048


def measure(context: Context) -> Iterator[Measurement]:
    """Decode and prefill. Raises ImportError where torch or transformers is not there."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device: Any = torch.device("cpu" if context.small else "cuda")
    small: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    large: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
    }
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    large |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    with torch.device(device), torch.inference_mode():
        torch.set_default_dtype(torch.bfloat16)
        model: Any = LlamaForCausalLM(LlamaConfig(**(small if context.small else large))).eval()

        def synchronize() -> None:
            if not context.small:
                torch.cuda.synchronize()

        for rows in (1,) if context.small else ROWS:
            length = 16 if context.small else CONTEXT
            ids = torch.zeros((rows, length), dtype=torch.long)
            cache: Any = model(ids, use_cache=True, logits_to_keep=1).past_key_values
            last = ids[:, :1]

            def decode(cache: Any = cache, last: Any = last) -> None:
                for _ in range(STEPS):
                    model(last, past_key_values=cache, use_cache=True, logits_to_keep=1)

            seconds = _least(decode, synchronize) / STEPS
            yield Measurement(
                name=f"transformers, decode, bf16, {rows} rows of {length} tokens", seconds=seconds, tokens=rows
            )
        length = 16 if context.small else PREFILL
        ids = torch.zeros((1, length), dtype=torch.long)
        seconds = _least(lambda: model(ids, use_cache=True, logits_to_keep=1), synchronize)
        yield Measurement(name=f"transformers, prefill, bf16, {length} tokens", seconds=seconds, tokens=length)


def _least(run: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    """The least seconds of three calls, after one that warms up."""
    best = float("inf")
    for _ in range(4):
        synchronize()
        begin = time.perf_counter()
        run()
        synchronize()
        best = min(best, time.perf_counter() - begin)
    return best
