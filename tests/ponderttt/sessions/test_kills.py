"""SIGKILL at random instants while sessions are saved; `benchmarks/session_kills.py` does it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
KILLS = 200
# A killed process loses nothing of what a file system has been told; a disk only makes it slower.
MEMORY = Path("/dev/shm")


def test_sessions_survive_200_kills_at_random_instants(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    result = tmp_path / "result.json"
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "session_kills.py"),
         "--model", str(tiny_llama_dir), "--rank", "1", "--kills", str(KILLS), "--longest", "0.2",
         "--directory", str(MEMORY if MEMORY.is_dir() else tmp_path), "--json", str(result)],
        check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, timeout=500,
    )  # fmt: skip
    found = json.loads(result.read_text())
    assert found["kills"] == KILLS
    # Else the instants were not those that matter.
    assert found["kills_within_a_commit"] > 5
    # A commit takes its time under load: the bound that is promised is delay plus commit.
    assert found["oldest_lost_seconds"] < found["write_delay_seconds"] + 2.0
    assert max(found["last_versions"].values()) > 0
    kinds = ("marked", "rolled_back", "forking", "deleting", "deleted")
    assert all(found["events"][kind] > 5 for kind in kinds)
