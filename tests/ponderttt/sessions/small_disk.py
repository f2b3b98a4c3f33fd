"""Sessions on a disk that is full, then read-only; `test_small_disk.py` runs it in a namespace.

python -m tests.ponderttt.sessions.small_disk MODEL_DIRECTORY MOUNT_POINT
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import StoreError
from ponderttt.fast_weights.bank import AdapterState
from ponderttt.sessions.files import open_files
from ponderttt.sessions.store import SessionStore
from tests.ponderttt.sessions import stores
from tests.ponderttt.sessions.servers import Place, Server

NAMES = ("a", "b", "c")


class Filler:
    """Takes whatever room there is, the moment it is there."""

    def __init__(self, path: Path) -> None:
        self._path, self._stopped = path, False
        self._thread = threading.Thread(target=self._fill)
        self._thread.start()

    def _fill(self) -> None:
        with open(self._path, "ab", buffering=0) as file:
            while not self._stopped:
                try:
                    file.write(b"x" * 4096)
                except OSError:
                    time.sleep(0.0002)

    def stop(self) -> None:
        """And give it back."""
        self._stopped = True
        self._thread.join()
        self._path.unlink()


def check(place: Place, states: dict[str, AdapterState]) -> None:
    """What a server would find that started now."""
    store = SessionStore(open_files(place.url), stores.make_codec(place.directory), 3)
    assert store.listing().unreadable == {}
    for name, state in states.items():
        loaded = store.load(name)
        assert loaded.damaged == (), loaded.damaged
        assert stores.same(loaded.state, state), name


def full(place: Place, mount: Path) -> Server:
    """Whether new versions or records alone are to be written, what was committed stays."""
    server = place.start(slots=len(NAMES), write_delay=0.0)
    for name in NAMES:
        server.sessions.create(name, TTTParams())
    states = {name: server.teach(name) for name in NAMES}
    assert server.sessions.flush() == []
    filler = Filler(mount / "filler")
    time.sleep(0.2)
    for name in NAMES:
        server.sessions.get(name).chunks += 1  # `session.json` alone
    server.tick_until(lambda: server.stats.failures >= 2 * len(NAMES))
    check(place, states)
    learned = {name: server.teach(name) for name in NAMES}
    server.tick_until(lambda: server.stats.failures >= 4 * len(NAMES))
    check(place, states)
    filler.stop()
    assert server.sessions.flush() == []
    check(place, learned)
    return server


def read_only(place: Place) -> None:
    """A server starts, says what is there, and what keeps it from being used."""
    server = place.start()
    assert server.sessions.names() == list(NAMES[1:])
    assert server.sessions.unreadable() == {}
    for _ in range(2):
        with pytest.raises(StoreError, match="Read-only file system"):
            server.sessions.warm("b")
        server.sessions.tick()
    assert server.stats.failures >= 2


def main(directory: Path, mount: Path) -> None:
    place = Place(directory, str(mount / "sessions"))
    assert full(place, mount).sessions.close() == []
    (mount / "sessions" / "a" / "deleted").touch()  # a deletion that was cut short
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
    read_only(place)
    print("all is well")
    sys.stdout.flush()
    os._exit(0)  # the deletion is being tried again


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
