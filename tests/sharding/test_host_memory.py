"""Loading into shards takes no more memory of the host than the shards and little beside them: measured, in a process
whose model is large enough to show it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = {
    "GGUF": ["--type", "Q4_K", "--layout", "planar", "--mesh", "fsdp=4"],
    "HF layout": ["--type", "BF16", "--safetensors", "--layout", "rows", "--mesh", "fsdp=4"],
    "converted": ["--type", "Q4_0", "--converted", "--layout", "rows", "--mesh", "fsdp=4"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_beside_the_shards_there_is_less_than_a_fifth_more_than_the_largest_tensor(case: str, tmp_path: Path) -> None:
    own = [sys.executable, "-m", "bench.loading", "--layers", "1", "--folder", str(tmp_path), *CASES[case]]
    done = subprocess.run(own, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["device_bytes"] > 3 * measured["largest_bytes"]
    assert measured["peak_over_weights"] < 1.2
