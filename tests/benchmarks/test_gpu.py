"""The GPU benchmark ends in time, outlives whatever its sections do, and says beside each number what it should be."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from bench import gpu
from bench.gpu_sections import SECTIONS, SHARES, attention, engine, matmul, report
from bench.gpu_sections.limits import COPY, PRODUCT
from bench.gpu_sections.protocol import Context, Measurement
from bench.tune.__main__ import GAIN
from bench.tune.__main__ import main as tune
from bench.tune.search import neighbours
from bench.tune.subjects import subjects
from pallas_kernels.paged_attention_mosaic import tiles_that_fit
from pallas_kernels.tuning import MatmulTiles

ROOT = Path(__file__).parents[2]
CONTEXT = Context(small=False, bandwidth=4e12, matrix_peak=8e14)


def test_every_section_has_its_time_and_all_together_take_under_nine_minutes() -> None:
    assert list(SHARES) == list(SECTIONS)
    ends = dict(gpu.due_times(list(SECTIONS), gpu.BUDGET_S))
    assert list(ends.values()) == sorted(ends.values())
    assert ends["peer"] == pytest.approx(gpu.BUDGET_S)
    assert gpu.BUDGET_S < 9 * 60
    assert dict(gpu.due_times(["engine"], 530)) == {"engine": 530}


class TestSections:
    """With processes that only seem to run."""

    @pytest.fixture
    def fake(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """What the process of a section does: nothing, or end with a code, or outlive its time."""
        does: dict[str, Any] = {}

        def run(command: list[str], timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
            name, path = command[command.index("--section") + 1], Path(command[command.index("--out") + 1])
            found = report.read(path)
            rows = [report.as_row(Measurement(name="one", seconds=1.0), CONTEXT)]
            found["sections"][name] = {"measurements": rows}
            path.write_text(json.dumps(found))
            if does.get(name) == "hangs":
                raise subprocess.TimeoutExpired(command, timeout)
            return subprocess.CompletedProcess(command, does.get(name, 0), stderr="Traceback\nValueError: no\n")

        monkeypatch.setattr(gpu.subprocess, "run", run)
        return does

    def test_one_that_fails_or_hangs_ends_alone_and_keeps_what_it_measured(
        self, fake: dict[str, Any], tmp_path: Path
    ) -> None:
        fake |= {"matmul": 1, "attention": "hangs"}
        gpu.main(small=True, out=tmp_path / "gpu.json")
        sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
        assert list(sections) == list(SECTIONS)
        assert all(section["measurements"] for section in sections.values())
        problems = {name: section["problem"] for name, section in sections.items() if section["problem"]}
        assert set(problems) == {"matmul", "attention"}
        assert problems["matmul"] == "exit code 1: ValueError: no"
        assert "--only attention measures it alone" in problems["attention"]
        assert "Ended early: exit code 1: ValueError: no" in (tmp_path / "gpu.md").read_text()

    def test_a_later_run_completes_what_an_earlier_one_found(self, fake: dict[str, Any], tmp_path: Path) -> None:
        out = tmp_path / "gpu.json"
        fake["engine"] = 1
        gpu.main(small=True, out=out)
        fake.clear()
        gpu.main(only=["engine"], small=True, out=out)
        assert not any(section["problem"] for section in json.loads(out.read_text())["sections"].values())

    def test_an_unknown_one_is_refused(self) -> None:
        with pytest.raises(typer.BadParameter, match="'engin' is no section; there are limits, matmul"):
            gpu.main(only=["engin"])


class TestMarks:
    def test_each_stands_beside_what_was_reached(self) -> None:
        fast = Measurement(name="a", seconds=1e-3, moved_bytes=3 * 10**9, target=0.65, fraction_of="bandwidth")
        slow = Measurement(name="b", seconds=1e-3, others={"bf16": 5e-4}, target=0.6, fraction_of="bf16")
        rows = [report.as_row(one, CONTEXT) for one in (fast, slow)]
        assert [(row["fraction"], row["reached"]) for row in rows] == [(0.75, True), (0.5, False)]
        page = report.markdown({"machine": {}, "sections": {"x": {"measurements": rows}}})
        assert "| 0.750 | 0.65 yes |" in page
        assert "| 0.500 | 0.60 NO | bf16 500.0 |" in page

    def test_they_are_fractions_of_what_the_same_run_measured(self) -> None:
        limits = [
            {"name": COPY, "moved_bytes": 8 * 10**9, "seconds": 2e-3, "operations": 0},
            {"name": PRODUCT, "operations": 8 * 10**11, "seconds": 1e-3, "moved_bytes": 0},
        ]
        context = report.context_of({"sections": {"limits": {"measurements": limits}}}, small=False)
        assert (context.bandwidth, context.matrix_peak) == (4e12, 8e14)

    def test_what_an_h200_should_reach(self) -> None:
        decode, prefill = attention.CASES[:2]
        assert (decode.rows, decode.context, prefill.chunk) == (64, 4096, 4096)
        assert {decode.name: 0.80, prefill.name: 0.55} == attention.TARGETS
        assert engine.TARGETS == {"bf16": 0.80, "Q4_K": 0.55}
        assert matmul._target("Q4_K", 1, int8=False) == {"target": 0.65, "fraction_of": "bandwidth"}
        assert matmul._target("IQ4_NL", 512, int8=False) == {"target": 0.6, "fraction_of": "bf16"}
        assert matmul._target("ternary", 1, int8=True) == {"target": 0.5, "fraction_of": "bandwidth"}


def test_what_is_not_a_number_is_not_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    [case, *_] = attention._TINY

    def sick(run: Any, pages: Any, inputs: Any, *_: Any) -> Any:
        out, pages = run(pages, *inputs)
        return 1.0, out * float("nan"), pages

    monkeypatch.setattr(attention, "_timed", sick)
    _, error = attention._measured(case, Context(small=True))
    assert report.as_row(Measurement(name="a", seconds=1.0, error=error, allowed=1.0), CONTEXT)["correct"] is False


@pytest.mark.slow  # a process for each section, and their programs
@pytest.mark.parametrize("name", ["limits", "matmul", "attention", "engine"])
def test_every_section_runs_to_its_end_on_a_cpu(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--small", "--only", name, "--out", str(tmp_path / "gpu.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=900)
    section = json.loads((tmp_path / "gpu.json").read_text())["sections"][name]
    assert section["problem"] is None
    assert all(row["seconds"] > 0 and row["correct"] is not False for row in section["measurements"])


@pytest.mark.slow  # a process that compiles products
def test_tuning_keeps_what_beats_the_default_tiles_of_a_shape(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "bench.tune", "--small", "--rounds", "1", "--folder", str(tmp_path)]
    subprocess.run([*command, "--log", str(log)], cwd=ROOT, check=True, capture_output=True, timeout=600)
    [tuned] = [json.loads(line) for line in log.read_text().splitlines()]
    seconds = [one["seconds"] for one in tuned["times"]]
    assert seconds == sorted(seconds)
    [default] = [one["seconds"] for one in tuned["times"] if one["default"]]
    kept = json.loads((tmp_path / "cpu.json").read_text())["planar_matmul"]
    key = "rows 1, N 128, K 512, bits 4, group 32"
    assert kept == ({key: tuned["times"][0]["tiles"]} if default > GAIN * seconds[0] else {})


def test_neighbours_of_tiles_differ_by_one_step_and_stay_in_bounds() -> None:
    tiles = MatmulTiles(block_n=64, block_m=16, splits=1, warps=8, stages=4)
    found = list(neighbours(tiles))
    assert replace(tiles, stages=5) in found
    assert replace(tiles, block_n=32, warps=4) in found
    assert replace(tiles, block_n=32, splits=2) in found
    assert not any(one.splits < 1 or one.warps > 8 or one == tiles for one in found)
    by_mosaic = tiles_that_fit(128)
    found = list(neighbours(by_mosaic))
    assert {one.kernel for one in found} == {"mosaic"}
    assert replace(by_mosaic, span=64) in found


@pytest.mark.parametrize("only", ["(", "no such kernel"])
def test_tuning_nothing_is_refused(only: str) -> None:
    with pytest.raises(typer.BadParameter, match=re.escape(f"only: {only!r}")):
        tune(only=only)


def test_everything_that_is_tuned_has_a_key_of_its_own() -> None:
    keys = [(one.operation, one.key) for one in subjects(small=False)]
    assert len(set(keys)) == len(keys)
