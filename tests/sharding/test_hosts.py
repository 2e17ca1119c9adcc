"""One engine over several processes, which Gloo connects on this machine: answers of one device, and a clean end
whoever goes first."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any

import pytest

from atoma_jax import LLM
from tests.engine.traffic import brief, run_all
from tests.sharding.host_process import asks
from tests.sharding.test_engine import SIZES
from tests.tiny_model import write_tiny_llama

ROOT = Path(__file__).parents[2]
PATIENCE = 20  # seconds in which everybody knows that a process is gone


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "m.gguf", embedding_scale=0.35, width=256, heads=(8, 2))


@pytest.fixture(scope="module")
def want(path: Path) -> list[Any]:
    """What one device answers."""
    llm = LLM(str(path), **SIZES)
    outputs = run_all(llm.llm_engine, asks())
    llm.shutdown()
    return json.loads(json.dumps([[brief(sample) for sample in output.outputs] for output in outputs]))


class Processes:
    """Several processes of one engine."""

    def __init__(self, started: list[subprocess.Popen[str]]):
        self.started = started

    def __getitem__(self, process: int) -> subprocess.Popen[str]:
        return self.started[process]

    def news(self, key: str) -> Any:
        """What process 0 says next under a key; fails if it ends before."""
        stream: IO[str] | None = self[0].stderr
        assert stream is not None
        seen: list[str] = []
        for line in stream:
            seen.append(line)
            if line.startswith("{") and key in (said := json.loads(line)):
                return said[key]
        others = [other.communicate()[1] for other in self.started[1:]]
        raise AssertionError("\n".join(["".join(seen), *others]))


StartAll = Callable[..., Processes]


@pytest.fixture
def start_all(path: Path, request: pytest.FixtureRequest) -> Generator[StartAll]:
    """Starts processes, and ends those that are left."""
    started: list[subprocess.Popen[str]] = []
    cache = request.config.cache
    assert cache is not None

    def start(mesh: str, processes: int, devices: int, *, goes_on: bool = False, last: Any = None) -> Processes:
        address = f"127.0.0.1:{free_port()}"
        for process in range(processes):
            options = {**SIZES, "mesh": mesh, "coordinator_address": address, "num_processes": processes}
            options |= {"process_id": process, "compile_cache_dir": str(cache.mkdir("xla"))}
            if process == processes - 1:
                options |= last or {}
            asked = {"model": str(path), "options": options, "devices": devices, "goes_on": goes_on}
            command = [sys.executable, "-m", "tests.sharding.host_process", json.dumps(asked)]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
        return Processes(started)

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def answers(processes: Processes, count: int) -> list[Any]:
    return [processes.news("finished") for _ in range(count)]


@pytest.mark.slow
def test_two_processes_answer_as_one_device_and_end_with_an_error_when_one_is_killed(
    start_all: StartAll, want: list[Any]
) -> None:
    """Both in one start, which takes seconds."""
    processes = start_all("fsdp=2", 2, 1, goes_on=True)
    assert answers(processes, len(want)) == want
    assert processes.news("new") == 0
    assert processes.news("busy")
    processes[1].kill()
    assert "process 1 is lost" in processes.news("error")
    assert processes[0].wait(PATIENCE) == 1, "whoever lost a process ends so, however its program ends"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "count", "devices"),
    [("data=2", 2, 1), ("tensor=2", 2, 1), ("fsdp=2,tensor=2", 2, 2), ("data=2,fsdp=2", 4, 1), ("tensor=4", 4, 1)],
)
def test_any_mesh_answers_as_one_device_and_all_end_well(
    mesh: str, count: int, devices: int, start_all: StartAll, want: list[Any]
) -> None:
    processes = start_all(mesh, count, devices)
    assert answers(processes, len(want)) == want
    assert processes.news("hits") > 0
    assert [process.wait(PATIENCE) for process in processes.started] == [0] * count


@pytest.mark.slow
def test_the_others_end_when_process_0_is_killed(start_all: StartAll) -> None:
    processes = start_all("fsdp=2", 2, 1, goes_on=True)
    assert processes.news("busy")
    processes[0].kill()
    assert processes[1].wait(PATIENCE) != 0


@pytest.mark.slow
def test_a_process_that_is_silent_is_lost(start_all: StartAll) -> None:
    """As of a machine that lost its power: no connection is closed."""
    processes = start_all("fsdp=2", 2, 1, goes_on=True)
    assert processes.news("busy")
    processes[1].send_signal(signal.SIGSTOP)
    assert "nothing was heard" in processes.news("error")
    assert processes[0].wait(PATIENCE) == 1
    processes[1].send_signal(signal.SIGCONT)
    assert processes[1].wait(PATIENCE) != 0


@pytest.mark.slow
def test_processes_that_do_not_go_together_are_refused_at_all_of_them(start_all: StartAll, path: Path) -> None:
    processes = start_all("fsdp=2", 2, 1, last={"max_num_seqs": 2, "decode_rows": (2,)})
    for process in processes.started:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1, "as Python ends with an error"
        assert "every process must have the same max_num_seqs: process 0 has 4, process 1 has 2" in said


@pytest.mark.slow
def test_all_end_at_once_when_one_cannot_start(start_all: StartAll, path: Path) -> None:
    """None waits for the others' farewell to JAX's coordinator, which comes no more."""
    processes = start_all("fsdp=2", 2, 1, last={"max_num_batched_tokens": 2})
    for process in processes.started:
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert "max_num_batched_tokens: must be at least max_num_seqs = 4, got 2" in said
