"""Memory of a process and all its descendants, as `/proc` shows it."""

from __future__ import annotations

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
        return path.read_text()
    except OSError:
        return ""
