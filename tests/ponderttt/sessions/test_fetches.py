"""Reading sessions that were put away, deleted meanwhile, or damaged."""

from __future__ import annotations

import errno
import logging

import pytest

from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import (
    ConflictError,
    DamagedSessionError,
    NotFoundError,
    StoreError,
)
from ponderttt.sessions.record import RECORD_FILE
from tests.ponderttt.sessions.servers import Place, faults
from tests.ponderttt.sessions.stores import same


def test_creating_a_session_in_a_broken_store_fails_for_that_session_alone(faulty: Place) -> None:
    server = faulty.start()
    server.sessions.create("good", TTTParams())
    server.sessions.flush()
    faults(faulty).reads = errno.EIO
    session = server.sessions.get("good")
    server.upkeep.put_away(session)
    with pytest.raises(StoreError, match="can't read"):
        server.sessions.warm("good")
    assert server.stats.failures == 1
    server.sessions.create("other", TTTParams())
    faults(faulty).reads = None
    assert server.sessions.warm("good").version == 0


def test_damaged_newest_version_is_replaced_by_the_one_before(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    server = place.start()
    server.sessions.create("repo", TTTParams())
    states = []
    for _ in range(3):
        states.append(server.teach("repo"))
        server.sessions.flush()
    server.sessions.close()
    server.files.write("repo/v00000003/adapter_model.safetensors", b"damaged")
    again = place.start()
    with caplog.at_level(logging.WARNING):
        session = again.sessions.warm("repo")
    assert "session repo, version 3 is damaged: adapter_model.safetensors" in caplog.text
    assert again.stats.recoveries == 1
    assert same(again.sessions.state(session), states[1])
    # Clients may have seen version 3: its number is not used again.
    assert session.version == 4
    again.sessions.flush()
    assert session.kept == (2, 3, 4)
    assert again.teach("repo") is not None
    again.sessions.close()
    assert place.start().sessions.get("repo").version == 5


def test_unreadable_session_is_reported_and_the_others_go_on(place: Place) -> None:
    server = place.start()
    for name in ("bad", "good"):
        server.sessions.create(name, TTTParams())
    server.sessions.close()
    record = server.files.read(f"bad/v00000000/{RECORD_FILE}")
    assert record is not None
    server.files.write(f"bad/v00000000/{RECORD_FILE}", b"{")
    again = place.start()
    assert again.sessions.names() == ["good"]
    assert again.stats.unreadable == 1
    for act in (again.sessions.get, again.sessions.warm):
        with pytest.raises(DamagedSessionError, match="'bad' can't be read"):
            act("bad")
    with pytest.raises(ConflictError, match="exists already"):
        again.sessions.create("bad", TTTParams())
    again.teach("good")
    # Restored from a backup, it is found without a restart.
    again.files.write(f"bad/v00000000/{RECORD_FILE}", record)
    assert again.sessions.warm("bad").version == 0
    assert again.stats.unreadable == 0


def test_what_was_fetched_before_a_deletion_does_not_bring_the_session_back(place: Place) -> None:
    server = place.start()
    server.sessions.create("repo", TTTParams())
    server.teach("repo")
    server.sessions.close()
    server = place.start()
    loaded = server.sessions.ahead.fetch("repo").result()
    deleted = server.sessions.delete("repo")
    assert deleted is not None
    with pytest.raises(NotFoundError):
        server.sessions.warm("repo", loaded)
    deleted.result()
    server.tick_until(lambda: not server.vault._deletions)
    with pytest.raises(NotFoundError):
        server.sessions.ahead.fetch("repo").result()
    assert server.sessions.names() == []
    # The name is free again, and what has it is another session.
    server.sessions.create("repo", TTTParams())
    server.sessions.flush()
    assert server.sessions.warm("repo", loaded).version == 0


def test_session_deleted_while_it_is_read_leaves_no_lock(faulty: Place) -> None:
    server = faulty.start()
    server.sessions.create("repo", TTTParams())
    server.teach("repo")
    server.sessions.close()
    server = faulty.start()
    faults(faulty).seconds = 0.05
    reading = server.sessions.ahead.fetch("repo")
    deleted = server.sessions.delete("repo")
    assert deleted is not None
    deleted.result()
    with pytest.raises(NotFoundError):
        reading.result()
    server.tick_until(lambda: not server.vault._deletions)
    assert server.vault.holds._locks.held() == []
