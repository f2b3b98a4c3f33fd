"""Memory and processor time of a process and its descendants, as `/proc` shows them."""

from __future__ import annotations

import os
from pathlib import Path

_PROC = Path("/proc")


def tree_bytes(root: int, limit: int) -> int:
    """Bytes in memory; pages that processes share are counted once where the sum is near `limit`.

    Args:
        root: process id.
        limit: bytes; below it a cheap sum that counts shared pages more than once is enough.
    """
    processes = list(_descendants(root))
    quick = sum(_resident_kilobytes(pid) for pid in processes) * 1024
    if quick <= limit:
        return quick
    return sum(_proportional_kilobytes(pid) for pid in processes) * 1024


def tree_cpu_seconds(root: int) -> float:
    """Processor time of all processes, those included that have ended and were waited for.

    Args:
        root: process id.
    """
    ticks = 0
    for pid in _descendants(root):
        # The name of the program may hold anything; what follows is fields 3, 4, … of proc(5).
        fields = _read(_PROC / str(pid) / "stat").rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _descendants(root: int) -> set[int]:
    found, waiting = {root}, [root]
    while waiting:
        for task in _list(_PROC / str(waiting.pop()) / "task"):
            fresh = {int(pid) for pid in _read(task / "children").split()} - found
            found |= fresh
            waiting.extend(fresh)
    return found


def _resident_kilobytes(pid: int) -> int:
    return _field(_read(_PROC / str(pid) / "status"), "VmRSS:")


def _proportional_kilobytes(pid: int) -> int:
    text = _read(_PROC / str(pid) / "smaps_rollup")
    # Another user's process tells its resident size only.
    return _field(text, "Pss:") if text else _resident_kilobytes(pid)


def _field(text: str, name: str) -> int:
    for line in text.splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0


def _list(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:  # it has ended
        return []


def _read(path: Path) -> str:
    try:
        # A program can name itself with any bytes.
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
