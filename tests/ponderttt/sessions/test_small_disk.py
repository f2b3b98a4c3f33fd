"""A disk that is really full, and one that is really read-only: a small one, mounted for a child.

`test_writes.py` has the same faults injected, where nothing can be mounted.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Root in a user namespace of its own may mount in a mount namespace of its own.
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
MOUNT = 'mount -t tmpfs -o size=192k none "$1"'


def test_committed_versions_outlive_a_full_disk_and_are_listed_on_a_read_only_one(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    try:
        subprocess.run([*NAMESPACE, MOUNT, "sh", tmp_path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    child = f'{MOUNT} && exec "$3" -m tests.ponderttt.sessions.small_disk "$2" "$1"'
    done = subprocess.run(
        [*NAMESPACE, child, "sh", tmp_path, tiny_llama_dir, sys.executable],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.endswith("all is well\n"), done.stdout + done.stderr
