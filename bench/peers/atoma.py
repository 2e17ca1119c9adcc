"""This engine, through its Python interface."""

import json
import time

import jax
import platformdirs

from atoma_jax import LLM, RequestOutputKind, SamplingParams, __version__
from bench.peers.protocol import Setup, Timing


class Atoma:
    """An `LLM` whose loop is driven step by step, so that every token has a time."""

    def __init__(self, setup: Setup):
        """Options are settings of `atoma_jax.config`, as JSON values. Its threads are JAX's: all cores it may use."""
        options = {name: json.loads(value) for name, value in setup.options.items()}
        programs = str(platformdirs.user_cache_path("atoma-jax") / "programs")  # where the command line keeps them
        chosen = {
            "max_num_seqs": setup.num_seqs,
            "max_model_len": setup.max_len,
            "compile_cache_dir": programs,
            **options,
        }
        self._llm = LLM(setup.model, **chosen)
        self._num_requests = 0
        startup = self._llm.startup
        self.description = (
            f"atoma-jax {__version__}, JAX {jax.__version__}, {startup.kernels} kernels, {startup.total:.1f} s to start"
        )

    def run(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """See `Peer.run`."""
        params = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        engine = self._llm.llm_engine
        begin = time.perf_counter()
        tokens: dict[str, list[int]] = {}
        for prompt in prompts:
            self._num_requests += 1
            request_id = f"compare-{self._num_requests}"
            tokens[request_id] = []
            engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        first: float | None = None
        early = 0  # tokens that came before every sequence had one
        while engine.has_work:
            for output in engine.step():
                tokens[output.request_id] += output.outputs[0].token_ids
            if first is None and all(tokens.values()):
                first = time.perf_counter() - begin
                early = sum(map(len, tokens.values()))
        total = time.perf_counter() - begin
        assert first is not None
        decoded = sum(map(len, tokens.values())) - early
        return Timing(first_s=first, total_s=total, decoded=decoded, token_ids=list(tokens.values()))


def load(setup: Setup) -> Atoma:
    """Starts the engine."""
    return Atoma(setup)
