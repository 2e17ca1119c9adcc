"""llama.cpp through the low-level interface of `llama-cpp-python`: batched prefill and decode over sequences."""

# Its library is not in every environment, and has no types.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false, reportAttributeAccessIssue=false, reportArgumentType=false

import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np

from bench.peers.protocol import Setup, Timing

BATCH = 2048  # tokens of a call, llama.cpp's default; it computes them 512 at a time


@llama_cpp.llama_log_callback
def _silence(_level: int, _text: bytes, _user_data: Any) -> None:
    """Its log goes nowhere."""


class LlamaCpp:
    """A context whose sequences each have their own part of the KV cache, as `llama-batched-bench` sets it up."""

    def __init__(self, setup: Setup):
        """Option `use_extra_bufts`: true (llama.cpp's default) or false, which leaves out AMX and repacked weights.

        Its AMX kernels end with a segmentation fault on some virtual machines whose processor has AMX.

        Raises:
            ValueError: the file cannot be loaded, or another option was given.
        """
        extra = setup.options.get("use_extra_bufts", "true")
        if set(setup.options) - {"use_extra_bufts"} or extra not in ("true", "false"):
            raise ValueError(f"llama_cpp takes use_extra_bufts=true or use_extra_bufts=false, got {setup.options}")
        llama_cpp.llama_log_set(_silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_extra_bufts = extra == "true"
        model = llama_cpp.llama_model_load_from_file(setup.model.encode(), model_params)
        if not model:
            raise ValueError(f"llama.cpp cannot load {setup.model}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = setup.num_seqs * setup.max_len
        params.n_seq_max = setup.num_seqs
        params.n_batch = BATCH
        params.n_threads = params.n_threads_batch = setup.threads
        context = llama_cpp.llama_init_from_model(model, params)
        if not context:
            raise ValueError("llama.cpp cannot build a context")
        self._context = context
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.description = (
            f"llama.cpp (llama-cpp-python {llama_cpp.__version__}), {setup.threads} threads, use_extra_bufts={extra}"
        )

    def run(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """See `Peer.run`."""
        begin = time.perf_counter()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        length = len(prompts[0])
        entries = [
            (token, position, seq, position == length - 1)
            for seq, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        produced: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(entries), BATCH):
            for seq, token in self._decode(entries[start : start + BATCH]):
                produced[seq].append(token)
        first = time.perf_counter() - begin
        for position in range(length, length + new_tokens - 1):
            rows = [(tokens[-1], position, seq, True) for seq, tokens in enumerate(produced)]
            for seq, token in self._decode(rows):
                produced[seq].append(token)
        total = time.perf_counter() - begin
        return Timing(first_s=first, total_s=total, decoded=len(prompts) * (new_tokens - 1), token_ids=produced)

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[tuple[int, int]]:
        """One call; (token, position, sequence, wants logits) a row. Returns (sequence, likeliest token)."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for row, (token, position, seq, wanted) in enumerate(entries):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = seq
            batch.logits[row] = wanted
        code = llama_cpp.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        return [(seq, self._likeliest(row)) for row, (_, _, seq, wanted) in enumerate(entries) if wanted]

    def _likeliest(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


def load(setup: Setup) -> LlamaCpp:
    """Starts the engine."""
    return LlamaCpp(setup)
