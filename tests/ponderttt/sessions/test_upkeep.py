"""Sessions that nobody uses: from the bank to RAM, to the store alone, and away."""

from __future__ import annotations

import errno
import itertools
import time

import pytest

from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import (
    ConflictError,
    NotFoundError,
)
from ponderttt.fast_weights.bank import BASE_SLOT
from tests.ponderttt.sessions.servers import Place, faults
from tests.ponderttt.sessions.stores import same


def test_sessions_move_between_bank_ram_and_store_and_lose_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(1_700_000_000)
    server = place.start(slots=2, ram_sessions=1, write_delay=0.0)
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    names = [f"s{i}" for i in range(6)]
    for name in names:
        server.sessions.create(name, TTTParams())
    states = {}
    for _ in range(3):
        for name in names:
            states[name] = server.teach(name)
            server.sessions.flush()
            server.upkeep.trim()
    everyone = [server.sessions.get(name) for name in names]
    assert sum(s.slot != BASE_SLOT for s in everyone) == 2
    assert sum(s.state is not None for s in everyone) == 1
    assert sum(s.cold for s in everyone) == 3
    # Least recently used first.
    assert [s.owner for s in everyone if s.cold] == names[:3]
    for name in names:
        assert same(server.sessions.state(server.sessions.get(name)), states[name])
        assert server.sessions.get(name).version == 3
    assert server.stats.loads >= 12


def test_unsaved_session_is_not_put_away(faulty: Place) -> None:
    server = faulty.start(ram_sessions=0, write_delay=0.0, idle_seconds=0.0)
    server.sessions.create("repo", TTTParams())
    server.sessions.flush()
    faults(faulty).error = errno.ENOSPC
    state = server.teach("repo")
    for _ in range(5):
        server.sessions.tick()
        server.upkeep.trim()
        time.sleep(0.06)
    session = server.sessions.get("repo")
    assert not session.cold
    assert same(server.sessions.state(session), state)


def test_idle_session_is_left_to_other_servers(place: Place) -> None:
    one, other = place.start(idle_seconds=0.0, write_delay=0.0), place.start()
    one.sessions.create("repo", TTTParams())
    one.teach("repo")
    one.tick_until(lambda: one.sessions.get("repo").cold)
    # The other server did not know it when it began.
    with pytest.raises(NotFoundError):
        other.sessions.get("repo")
    one.tick_until(lambda: not one.vault.holds._locks.held())
    other.teach("repo")
    assert other.sessions.get("repo").version == 2
    with pytest.raises(ConflictError, match="in use by another server"):
        one.sessions.warm("repo")
    other.sessions.close()
    one.teach("repo")
    assert one.sessions.get("repo").version == 3
    assert one.sessions.get("repo").learned.keys() == {f"repo-{i}" for i in (1, 2, 3)}


def test_unused_sessions_expire_and_used_ones_stay(place: Place) -> None:
    server = place.start(ttl=50.0)
    for name in ("old", "new", "busy"):
        server.sessions.create(name, TTTParams())
        server.teach(name)
    server.sessions.flush()
    server.sessions.acquire(server.sessions.get("busy"))
    for name in ("old", "busy"):
        server.sessions.get(name).last_used -= 100.0
    server.sessions.flush()
    server.sessions.tick()
    assert server.sessions.names() == ["new", "busy"]
    server.tick_until(lambda: "old" not in server.files.names())
    assert {"new", "busy"} <= set(server.files.names())


def test_session_that_another_server_has_used_does_not_expire(place: Place) -> None:
    one = place.start(ttl=50.0)
    other = place.start()
    other.sessions.create("repo", TTTParams())
    other.sessions.close()
    session = one.sessions.warm("repo")
    one.upkeep.put_away(session)
    session.last_used -= 100.0  # all that this server knows
    one.sessions.tick()
    assert one.sessions.names() == []
    one.tick_until(lambda: not one.vault._deletions)
    assert one.sessions.warm("repo").version == 0
