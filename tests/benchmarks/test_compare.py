"""`bench/compare.py`: rates from timings, ratios within a round, turns, and peers that are missing or fail."""

import sys
from pathlib import Path
from typing import Any

import pytest

from bench import compare
from bench.compare import PeerError, Sizes, Worker
from bench.compare_report import markdown, ratios, report, share
from bench.peers import worker as worker_module
from bench.roofline import Gauge, Peaks

SIZES = Sizes(prefill_tokens=512, decode_tokens=128, num_seqs=16, prompt_tokens=128, output_tokens=64)


class FakeWorker(Worker):
    """A peer that takes a known time for everything, and writes down when it was called."""

    def __init__(self, name: str, first: float, token: float, calls: list[str]):
        self.name, self._first, self._token, self._calls = name, first, token, calls
        self.prompts: list[list[list[int]]] = []
        self.fails_at: int | None = None

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        self._calls.append(self.name)
        self.prompts.append(prompts)
        if len(self.prompts) == self.fails_at:
            raise PeerError(f"{self.name}: broke")
        return {
            "first_s": self._first,
            "total_s": self._first + self._token * (new_tokens - 1),
            "decoded": len(prompts) * (new_tokens - 1),
        }


def test_rates_are_what_the_table_in_the_docstring_says() -> None:
    timings = {
        "prefill": {"first_s": 6.0, "total_s": 6.0, "decoded": 0},  # of three
        "decode": {"first_s": 0.5, "total_s": 1.77, "decoded": 127},
        "batch": {"first_s": 5.0, "total_s": 8.0, "decoded": 900},  # 108 came while others were still read
    }
    assert SIZES.rates(timings) == {
        "prefill": 256.0,
        "decode": pytest.approx(100.0),
        "batch": 128.0,
        "batch_decode": 300.0,
    }


def test_rounds_take_turns_with_the_same_new_prompts_for_all() -> None:
    calls: list[str] = []
    ours, theirs = FakeWorker("atoma", 1.0, 0.01, calls), FakeWorker("llama_cpp", 2.0, 0.01, calls)
    results = compare.compare([ours, theirs], SIZES, rounds=3, vocab_size=5000, seed=0)
    assert {name: {kind: len(rates) for kind, rates in kinds.items()} for name, kinds in results.items()} == {
        name: dict.fromkeys(("prefill", "decode", "batch", "batch_decode"), 3) for name in ("atoma", "llama_cpp")
    }
    assert results["atoma"]["prefill"] == [512.0] * 3
    assert ours.prompts == theirs.prompts
    flat = [tuple(prompt) for prompts in ours.prompts for prompt in prompts]
    assert len(flat) == len(set(flat)) == 4 * (3 + 1 + 16)
    assert calls[:8] == ["atoma"] * 3 + ["llama_cpp"] * 3 + ["atoma", "llama_cpp"]
    assert calls[10:16] == ["llama_cpp"] * 3 + ["atoma"] * 3  # the next round goes the other way round


def test_ratios_are_taken_within_a_round() -> None:
    results = {
        "atoma": {"prefill": [100.0, 50.0, 90.0]},
        "slow": {"prefill": [50.0, 25.0, 30.0]},  # the second round was slow for both
    }
    assert ratios(results) == {"slow": {"prefill": {"median": 2.0, "min": 2.0, "max": 3.0}}}


def test_a_peer_that_fails_is_left_out_and_the_rest_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []
    ours, theirs = FakeWorker("atoma", 1.0, 0.01, calls), FakeWorker("llama_cpp", 2.0, 0.01, calls)
    theirs.fails_at = 5
    results = compare.compare([ours, theirs], SIZES, rounds=2, vocab_size=5000, seed=0)
    assert set(results) == {"atoma"}
    assert "llama_cpp: left out" in capsys.readouterr().out


def test_the_machine_is_measured_around_each_run_of_this_engine() -> None:
    calls: list[str] = []

    class FakeGauge(Gauge):
        def __init__(self) -> None:
            self.count = 0

        def measure(self) -> Peaks:
            calls.append("gauge")
            self.count += 1
            return Peaks(bytes_per_s=self.count, products_per_s=1)

    ours, theirs = FakeWorker("atoma", 1.0, 0.01, calls), FakeWorker("llama_cpp", 2.0, 0.01, calls)
    peaks: dict[str, list[Peaks]] = {}
    compare.compare([ours, theirs], SIZES, rounds=2, vocab_size=5000, seed=0, gauge=FakeGauge(), peaks=peaks)
    assert "gauge" not in calls[:10]  # what warms up is not measured
    assert calls[10:18] == ["llama_cpp"] * 3 + ["gauge"] + ["atoma"] * 3 + ["gauge"]
    assert {work: [own.bytes_per_s for own in measured] for work, measured in peaks.items()} == {
        "prefill": [1.5, 7.5],
        "decode": [3.5, 9.5],
        "batch": [5.5, 11.5],
    }
    assert set(SIZES.works()) == set(compare.KINDS)


def test_what_is_reached_of_a_limit_is_taken_within_a_round() -> None:
    results = {"atoma": {"decode": [80.0, 40.0, 60.0]}}
    assert share(results, {"decode": [100.0, 50.0, 100.0]}, "decode") == pytest.approx(0.8)


def test_this_engine_must_not_fail() -> None:
    calls: list[str] = []
    ours = FakeWorker("atoma", 1.0, 0.01, calls)
    ours.fails_at = 1
    with pytest.raises(SystemExit) as caught:
        compare.compare([ours], SIZES, rounds=1, vocab_size=5000, seed=0)
    assert caught.value.code == 1


def test_the_table_names_peers_and_spreads(capsys: pytest.CaptureFixture[str]) -> None:
    report({"atoma": {"batch_decode": [100.0, 120.0]}, "openvino": {"batch_decode": [50.0, 40.0]}})
    table = capsys.readouterr().out
    assert "openvino" in table
    assert "batch decode" in table
    assert "×2.50 (2.00–3.00)" in table


def test_the_tables_say_how_much_of_the_machine_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    results = {"atoma": {"decode": [80.0, 120.0]}, "openvino": {"decode": [50.0, 40.0]}}
    limits = {"decode": [200.0, 200.0]}
    report(results, limits)
    assert "200.0 ( 50%)" in capsys.readouterr().out
    table = markdown(results, limits, {"atoma": "atoma 1", "openvino": "ov 2", "llama_cpp": "failed"})
    assert "| decode | 100.0 | 200.0: 50% reached | 45.0, ×2.30 (1.60–3.00) |" in table
    assert table.endswith("- atoma: atoma 1\n- openvino: ov 2\n")


PEER = """
from bench.peers.protocol import Timing
class Peer:
    description = "a peer"
    def run(self, prompts, new_tokens):
        print("a library that talks")
        if prompts == [[13]]:
            raise RuntimeError("unlucky")
        return Timing(first_s=0.5, total_s=1.0, decoded=0, token_ids=[[prompt[0]] * new_tokens for prompt in prompts])
def load(setup):
    return Peer()
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An interpreter that finds a peer called "fake" and one whose library is missing."""
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n" + _SHIM.format(root=str(compare.ROOT), peer=PEER))
    script.chmod(0o755)
    return str(script)


_SHIM = """
import sys, types
sys.path.insert(0, {root!r})
from bench.peers import worker
module = types.ModuleType("bench.peers.fake")
exec({peer!r}, module.__dict__)
sys.modules["bench.peers.fake"] = module
worker.MODULES = {{"fake": "fake", "absent": "absent"}}
sys.argv = sys.argv[2:]
worker.main()
"""
SETUP = {"model": "m.gguf", "threads": 1, "num_seqs": 2, "max_len": 8, "options": {}}


def test_a_worker_answers_whatever_its_library_prints(peer: str) -> None:
    worker = Worker("fake", peer, SETUP)
    try:
        assert (worker.description, worker.missing) == ("a peer", None)
        assert worker.run([[4], [5]], 3)["token_ids"] == [[4, 4, 4], [5, 5, 5]]
        with pytest.raises(PeerError, match=r"RuntimeError: unlucky[\s\S]*Traceback"):
            worker.run([[13]], 3)
    finally:
        worker.close()


def test_a_worker_says_that_its_library_is_missing(peer: str) -> None:
    worker = Worker("absent", peer, SETUP)
    worker.close()
    assert worker.missing is not None
    assert "bench.peers.absent" in worker.missing


def test_a_worker_that_dies_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(PeerError, match=r"ended early[\s\S]*out of memory"):
        Worker("fake", str(script), SETUP)


def test_every_peer_has_a_module() -> None:
    assert set(worker_module.MODULES) == {compare.ENGINE, *compare.PEERS}
    folder = compare.ROOT / "bench" / "peers"
    assert all((folder / f"{module}.py").is_file() for module in worker_module.MODULES.values())
