"""Asking another server for a session that is idle there.

A file `~wanted/<session>` in the store says that a server needs a session which another one has
the lock of. That one looks now and then, saves the session when no request uses it any more, and
lets go of its lock; whoever gets the lock removes the file. A server that is dead answers nothing,
and its locks end by themselves (see `locks.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable

from ponderttt.sessions.files import Files

WANTED = "~wanted"

#: Seconds after which a wish is forgotten; who still has it repeats it.
WISH_SECONDS = 10.0


class Wishes:
    """The wishes in a store; thread-safe. Keys are names of sessions' directories.

    Args:
        files: the store's.
    """

    def __init__(self, files: Files) -> None:
        self._files = files

    def ask_for(self, key: str) -> None:
        """Say that a session is wanted here; StoreError where the store fails."""
        self._files.replace(f"{WANTED}/{key}", json.dumps({"asked": time.time()}).encode())

    def fulfilled(self, key: str) -> None:
        """The session is here now."""
        if key in self._files.names(WANTED):
            self._files.remove(f"{WANTED}/{key}")

    def among(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that another server wants."""
        found = set(self._files.names(WANTED)).intersection(keys)
        return [key for key in found if self._is_fresh(key)]

    def _is_fresh(self, key: str) -> bool:
        path = f"{WANTED}/{key}"
        try:
            asked = float(json.loads(self._files.read(path) or b"{}")["asked"])
        except (ValueError, KeyError, TypeError, RecursionError):
            asked = 0.0
        if abs(time.time() - asked) < WISH_SECONDS:
            return True
        self._files.remove(path)
        return False
