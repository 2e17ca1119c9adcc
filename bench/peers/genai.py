"""OpenVINO GenAI: its own reading of the GGUF file, its continuous batching on the CPU."""

# Its library is not in every environment, and has no types.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false, reportAttributeAccessIssue=false

import time

import numpy as np
import openvino
import openvino_genai

from bench.peers.protocol import Setup, Timing


class OpenVino:
    """A continuously batched pipeline that is driven step by step."""

    def __init__(self, setup: Setup):
        """Takes no options.

        Raises:
            ValueError: an option was given.
        """
        if setup.options:
            raise ValueError(f"openvino takes no options, got {sorted(setup.options)}")
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = setup.num_seqs
        scheduler.max_num_batched_tokens = 512
        scheduler.cache_size = 1  # GB
        scheduler.enable_prefix_caching = False  # prompts are all different
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            setup.model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": setup.threads}
        )
        self._num_requests = 0
        self.description = f"OpenVINO GenAI {openvino_genai.__version__}, {setup.threads} threads"

    def run(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """See `Peer.run`."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        begin = time.perf_counter()
        handles = []
        for prompt in prompts:
            self._num_requests += 1
            ids = openvino.Tensor(np.asarray([prompt], np.int64))
            handles.append(self._pipeline.add_request(self._num_requests, ids, config))
        produced: list[list[int]] = [[] for _ in prompts]
        first: float | None = None
        early = 0  # tokens that came before every sequence had one
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for row, handle in enumerate(handles):
                if handle.can_read():
                    for output in handle.read().values():
                        produced[row] += output.generated_ids
            if first is None and all(produced):
                first = time.perf_counter() - begin
                early = sum(map(len, produced))
        total = time.perf_counter() - begin
        if first is None:
            raise RuntimeError("OpenVINO ended without a token for every sequence")
        decoded = sum(map(len, produced)) - early
        return Timing(first_s=first, total_s=total, decoded=decoded, token_ids=produced)


def load(setup: Setup) -> OpenVino:
    """Starts the pipeline."""
    return OpenVino(setup)
