"""What a session store has done, counted in several threads."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace


@dataclass(slots=True)
class StoreStats:
    """What the store has done so far, and what it has yet to do.

    Args:
        commits, commit_seconds, commit_bytes: that succeeded.
        failures: commits, loads and deletions that failed.
        loads, load_seconds: sessions read.
        recoveries: loads that found the newest version damaged and fell back to an older one.
        put_away: sessions whose weights were left to the store alone.
        unsaved: sessions with changes that are not committed yet.
        unsaved_seconds: age of the oldest of these changes.
        unreadable: sessions of which no version can be read.
    """

    commits: int = 0
    commit_seconds: float = 0.0
    commit_bytes: int = 0
    failures: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    recoveries: int = 0
    put_away: int = 0
    unsaved: int = 0
    unsaved_seconds: float = 0.0
    unreadable: int = 0


class Tally:
    """Counts of what has been done so far; thread-safe."""

    def __init__(self) -> None:
        self._stats = StoreStats()
        self._guard = threading.Lock()

    def count(self, **added: float) -> None:
        """Add to fields of `StoreStats`."""
        with self._guard:
            for name, amount in added.items():
                setattr(self._stats, name, getattr(self._stats, name) + amount)

    def stats(self, unsaved: int, unsaved_seconds: float) -> StoreStats:
        """A copy of the counts, with what has yet to be done; `unreadable` is the caller's."""
        with self._guard:
            return replace(self._stats, unsaved=unsaved, unsaved_seconds=unsaved_seconds)
