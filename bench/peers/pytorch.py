"""transformers on PyTorch: the file is dequantized while loading; eager forward passes over a static batch."""

# Its library is not in every environment, and has no types.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false, reportAttributeAccessIssue=false

import time
from pathlib import Path

import torch
import transformers

from bench.peers.protocol import Setup, Timing


class Transformers:
    """A model in one dtype."""

    def __init__(self, setup: Setup):
        """Option `dtype`: float32 (the default) or bfloat16.

        Raises:
            ValueError: an unknown option or dtype.
        """
        dtype = setup.options.get("dtype", "float32")
        if set(setup.options) - {"dtype"} or dtype not in ("float32", "bfloat16"):
            raise ValueError(f"transformers takes dtype=float32 or dtype=bfloat16, got {setup.options}")
        torch.set_num_threads(setup.threads)
        path = Path(setup.model)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=getattr(torch, dtype)
        ).eval()
        self.description = (
            f"transformers {transformers.__version__}, PyTorch {torch.__version__}, {dtype}, {setup.threads} threads"
        )

    def run(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """See `Peer.run`."""
        begin = time.perf_counter()
        first = 0.0
        with torch.inference_mode():
            cache = None
            rows = torch.tensor(prompts)
            produced: list[torch.Tensor] = []
            for number in range(new_tokens):
                output = self._model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = output.past_key_values
                rows = output.logits[:, -1].argmax(-1, keepdim=True)  # [B, 1]
                produced.append(rows)
                if number == 0:
                    first = time.perf_counter() - begin
        total = time.perf_counter() - begin
        decoded = len(prompts) * (new_tokens - 1)
        return Timing(first_s=first, total_s=total, decoded=decoded, token_ids=torch.cat(produced, dim=1).tolist())


def load(setup: Setup) -> Transformers:
    """Loads the model."""
    return Transformers(setup)
