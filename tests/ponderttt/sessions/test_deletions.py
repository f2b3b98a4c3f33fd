"""Deleting stored sessions, whatever comes in between."""

from __future__ import annotations

import errno

import pytest

from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import (
    ConflictError,
    NotFoundError,
    StoreError,
)
from ponderttt.sessions.record import RECORD_FILE
from tests.ponderttt.sessions.servers import Place, faults


def test_deleted_session_is_gone_from_the_store(place: Place) -> None:
    server = place.start()
    server.sessions.create("repo", TTTParams())
    server.teach("repo")
    server.sessions.flush()
    server.teach("repo")
    deleted = server.sessions.delete("repo")
    assert deleted is not None
    deleted.result(10)
    assert [name for name in server.files.names() if not name.startswith("~")] == []
    assert server.files.names("~locks") == []
    with pytest.raises(NotFoundError):
        server.sessions.warm("repo")
    server.tick_until(lambda: not server.vault._deletions)
    assert server.sessions.create("repo", TTTParams()).version == 0
    server.sessions.close()
    assert place.start().sessions.get("repo").version == 0


def test_deletion_that_fails_is_tried_again_until_it_succeeds(faulty: Place) -> None:
    server = faulty.start()
    server.sessions.create("repo", TTTParams())
    server.sessions.flush()
    faults(faulty).error = errno.EROFS
    deleted = server.sessions.delete("repo")
    assert deleted is not None
    with pytest.raises(StoreError):
        deleted.result(10)
    with pytest.raises(NotFoundError):
        server.sessions.get("repo")
    with pytest.raises(ConflictError, match="is being deleted"):
        server.sessions.create("repo", TTTParams())
    faults(faulty).error = None
    server.tick_until(lambda: "repo" not in server.files.names())


def test_unreadable_session_can_be_deleted(place: Place) -> None:
    server = place.start()
    server.sessions.create("bad", TTTParams())
    server.sessions.close()
    server.files.write(f"bad/v00000000/{RECORD_FILE}", b"{")
    again = place.start()
    deleted = again.sessions.delete("bad")
    assert deleted is not None
    deleted.result(10)
    assert "bad" not in again.files.names()
    with pytest.raises(NotFoundError):
        again.sessions.get("bad")


def test_deletion_that_was_cut_short_is_finished_by_the_next_server(place: Place) -> None:
    server = place.start()
    for name in ("gone", "there"):
        server.sessions.create(name, TTTParams())
    server.sessions.close()
    server.files.write("gone/deleted", b"")
    server = place.start()
    assert server.sessions.names() == ["there"]
    server.tick_until(lambda: server.files.names("gone") == [])
    server.tick_until(lambda: not server.vault._deletions)
    assert server.sessions.create("gone", TTTParams()).version == 0


def test_deletion_that_another_server_is_at_is_left_to_it(place: Place) -> None:
    server = place.start()
    server.sessions.create("gone", TTTParams())
    server.sessions.flush()
    server.files.write("gone/deleted", b"")  # and is stopped here, with the lock
    other = place.start()
    other.tick_until(lambda: not other.vault._deletions)
    assert len(server.files.names("gone")) > 1
    assert other.sessions.names() == []
