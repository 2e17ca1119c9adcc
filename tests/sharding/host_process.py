"""One of several processes of an engine, as a program of its own. Every one runs the same lines, as users' programs do.

Prints JSON lines: the answers to some requests; "busy" while a long one runs, so that somebody may end a process; and
how that ended.
"""

import json
import sys
import time
from random import Random
from typing import Any

import jax
from jax._src import compiler

from atoma_jax import LLM, EngineDeadError, SamplingParams
from tests.engine.traffic import brief, greedy, random_asks, run_all

NUM_ASKS = 24


def main() -> None:
    asked: dict[str, Any] = json.loads(sys.argv[1])
    jax.config.update("jax_num_cpu_devices", asked["devices"])
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_max_size", 2 << 30)
    # JAX lets process 0 alone keep programs, and those of other processes have other keys: tests keep all of them.
    compiler._cache_write.__globals__["distributed"] = _FirstProcess
    llm = LLM(asked["model"], **asked["options"])  # does not return in others than process 0
    engine = llm.llm_engine
    for output in run_all(engine, asks()):
        _say(finished=[brief(sample) for sample in output.outputs])
    engine.check_integrity()
    _say(hits=llm.stats().prefix_hit_tokens, preemptions=llm.stats().preemptions, new=llm.stats().recompilations)
    if asked.get("goes_on"):
        _say(busy=True)
        begin = time.monotonic()
        try:
            while True:
                llm.generate("the cat", SamplingParams(max_tokens=80, ignore_eos=True), use_tqdm=False)
        except EngineDeadError as error:
            _say(error=str(error), seconds=time.monotonic() - begin)
            raise SystemExit(7) from error
    llm.shutdown()


def asks() -> list[Any]:
    """Of every kind, half of them greedy."""
    found = random_asks(Random(11), NUM_ASKS)
    found[::2] = [greedy(ask) for ask in found[::2]]
    return found


class _FirstProcess:
    class global_state:  # noqa: N801  as JAX calls it
        process_id = 0


def _say(**news: Any) -> None:
    sys.stderr.write(json.dumps(news) + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
