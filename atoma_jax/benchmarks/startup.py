"""Start-up: a fresh process a measurement, from its creation until the first token's text is on its standard output.

Cold: the compile cache is empty. Warm: it holds what an earlier start left. The model file is read before, so both find
it in the operating system's page cache; the first start after a boot takes longer by the time of reading it.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from atoma_jax.benchmarks.statistics import summary
from atoma_jax.errors import AtomaError, UserError

_TAIL = 2000  # characters of a failed process's messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start. `seconds` is the whole, from outside; `phases` is what the process says, overlaps included."""

    seconds: float
    phases: dict[str, float]
    compile_cache_hits: int
    compile_cache_misses: int


def measure_startup(
    flags: Sequence[str], *, num_iters_cold: int, num_iters_warm: int, on_start: Callable[[str, Start], None]
) -> dict[str, Any]:
    """Starts the program again and again; the result as keys of a JSON object.

    Args:
        flags: engine flags of `atoma-jax generate`, the model among them, without those of the compile cache.
        num_iters_cold: starts with an empty compile cache each.
        num_iters_warm: starts after one that filled the cache.
        on_start: told of each measured start, "cold" or "warm".

    Raises:
        UserError: the program refused the flags.
        AtomaError: a start failed.
    """
    cold: list[Start] = []
    for _ in range(num_iters_cold):
        with tempfile.TemporaryDirectory(prefix="atoma-jax-") as folder:
            cold.append(_start(flags, folder))
        on_start("cold", cold[-1])
    warm: list[Start] = []
    if num_iters_warm:
        with tempfile.TemporaryDirectory(prefix="atoma-jax-") as folder:
            _start(flags, folder)
            for _ in range(num_iters_warm):
                warm.append(_start(flags, folder))
                on_start("warm", warm[-1])
    return {
        "num_iters_cold": num_iters_cold,
        "num_iters_warm": num_iters_warm,
        "cold": _result(cold),
        "warm": _result(warm),
    }


def _start(flags: Sequence[str], cache: str) -> Start:
    command = [sys.executable, "-m", "atoma_jax.cli", "generate", *flags, "--compile-cache-dir", cache]
    command += ["--prompt", "Hello", "--max-tokens", "1", "--temperature", "0", "--json"]
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as messages:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True)
        with process:
            assert process.stdout is not None
            line = process.stdout.readline()
            seconds = time.perf_counter() - begin
        if process.returncode or not line:
            messages.seek(0)
            _refuse(command, process.returncode, messages.read()[-_TAIL:].strip())
    timings = json.loads(line)["timings"]
    return Start(
        seconds=seconds,
        phases=timings["startup_phases_s"],
        compile_cache_hits=timings["compile_cache_hits"],
        compile_cache_misses=timings["compile_cache_misses"],
    )


def _refuse(command: list[str], code: int, messages: str) -> None:
    if code == 2:
        raise UserError("bench startup", command[3:], f"the program refused its flags: {messages}")
    raise AtomaError(f"bench startup: {' '.join(command)} ended with code {code}:\n{messages}")


def _result(starts: list[Start]) -> dict[str, Any] | None:
    if not starts:
        return None
    names = list(starts[0].phases)
    return {
        "seconds_to_first_token": summary([start.seconds for start in starts]),
        "phases_s": {name: sum(start.phases[name] for start in starts) / len(starts) for name in names},
        "compile_cache_hits": [start.compile_cache_hits for start in starts],
        "compile_cache_misses": [start.compile_cache_misses for start in starts],
    }
