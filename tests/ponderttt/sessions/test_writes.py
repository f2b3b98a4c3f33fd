"""Saving sessions: when it is due, and what happens while the store fails."""

from __future__ import annotations

import errno
import logging
import time
from pathlib import Path

import pytest
import torch

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.fast_weights.bank import AdapterState
from ponderttt.sessions.files import open_files
from ponderttt.sessions.session import Session
from ponderttt.sessions.store import SessionStore
from tests.ponderttt.sessions import stores
from tests.ponderttt.sessions.servers import COSTS, Place, facts, faults
from tests.ponderttt.sessions.stores import same


def test_changes_are_written_after_the_delay_and_not_before(place: Place) -> None:
    server = place.start(write_delay=0.4)
    server.sessions.create("repo", TTTParams())
    server.sessions.flush()
    commits = server.stats.commits
    server.teach("repo")
    begun = time.monotonic()
    server.tick_until(lambda: server.stats.commits > commits)
    assert 0.35 < time.monotonic() - begun < 5.0
    server.tick_until(lambda: server.sessions.get("repo").kept == (0, 1))
    assert server.stats.unsaved == 0


def test_skipped_chunk_writes_the_record_alone(place: Place) -> None:
    server = place.start()
    server.sessions.create("repo", TTTParams())
    server.sessions.flush()
    server.teach("repo")
    server.sessions.flush()
    nbytes = server.stats.commit_bytes
    session = server.sessions.get("repo")
    session.record(1.5, 1.0)
    session.ledger.charge(Action.SKIP, COSTS, 0.125)
    server.sessions.flush()
    assert 0 < server.stats.commit_bytes - nbytes < 4000
    assert session.kept == (0, 1)
    server.sessions.close()
    assert facts(place.start().sessions.get("repo")) == facts(session)


def test_snapshot_is_stored_even_where_the_session_learns_on_at_once(place: Place) -> None:
    server = place.start(write_delay=60.0, keep_versions=2)
    server.sessions.create("repo", TTTParams())
    server.teach("repo")
    state = server.teach("repo")
    saving = server.sessions.snapshot("repo")
    for _ in range(4):
        server.teach("repo")
    assert 2 in saving.result().kept
    assert server.sessions.flush() == []
    assert server.sessions.get("repo").kept == (2, 6)
    server.sessions.rollback("repo", 2)
    assert same(server.sessions.state(server.sessions.get("repo")), state)


def test_server_whose_lease_was_taken_writes_nothing_more(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    one = place.start(write_delay=0.0)
    one.sessions.create("repo", TTTParams())
    one.sessions.flush()
    reset: list[Session] = []
    one.sessions.on_reset = reset.append
    one.vault.holds._locks.release("repo")  # as if it had expired
    other = place.start(write_delay=0.0)
    theirs = other.teach("repo")
    other.sessions.flush()
    with caplog.at_level(logging.ERROR):
        one.teach("repo")
        one.tick_until(lambda: one.sessions.get("repo").cold)
    assert "goes on elsewhere" in caplog.text
    assert reset == [one.sessions.get("repo")]
    other.sessions.close()
    assert same(one.sessions.state(one.sessions.get("repo")), theirs)


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES])
def test_store_that_can_not_be_written_holds_up_nothing_and_catches_up(
    faulty: Place, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    server = faulty.start(write_delay=0.0)
    server.sessions.create("repo", TTTParams())
    committed = server.teach("repo")
    server.sessions.flush()
    faults(faulty).error = number
    for _ in range(3):
        state = server.teach("repo")
        server.sessions.tick()
    with caplog.at_level(logging.WARNING):
        server.tick_until(lambda: server.stats.failures >= 2)
    assert "session repo is not saved (attempt 1" in caplog.text
    assert server.stats.unsaved == 1
    assert same(server.sessions.state(server.sessions.get("repo")), state)
    assert server.sessions.flush(0.1) == ["repo"]
    # A restart now finds the last commit.
    store = SessionStore(open_files(faulty.url), stores.make_codec(faulty.directory), 3)
    loaded = store.load("repo")
    assert (loaded.facts.version, loaded.damaged) == (1, ())
    assert same(loaded.state, committed)
    # The store works again: all is saved.
    faults(faulty).error = None
    server.tick_until(lambda: server.stats.unsaved == 0)
    assert same(store.load("repo").state, state)


def test_store_that_fails_at_random_loses_nothing(faulty: Place) -> None:
    server = faulty.start(write_delay=0.0)
    server.sessions.create("repo", TTTParams())
    server.sessions.flush()
    faults(faulty).share = 0.35
    store = SessionStore(open_files(faulty.url), stores.make_codec(faulty.directory), 3)
    for _ in range(40):
        state = server.teach("repo")
        server.sessions.tick()
        time.sleep(0.02)
        assert store.load("repo").damaged == ()
    server.tick_until(lambda: server.stats.unsaved == 0, seconds=60)
    assert faults(faulty).failed >= 2
    assert same(store.load("repo").state, state)


def test_slow_store_does_not_hold_up_the_engine(faulty: Place) -> None:
    server = faulty.start(write_delay=0.0)
    server.sessions.create("repo", TTTParams())
    server.sessions.flush()
    faults(faulty).seconds = 0.3
    longest = 0.0
    for _ in range(20):
        server.teach("repo")
        begun = time.perf_counter()
        server.sessions.tick()
        longest = max(longest, time.perf_counter() - begun)
        time.sleep(0.03)
    assert longest < 0.25  # less than a single call of the store
    faults(faulty).seconds = 0.0
    assert server.sessions.flush(30) == []
    assert server.sessions.get("repo").kept[-1] == 20


def test_full_disk_costs_no_version_that_was_committed(faulty: Place) -> None:
    """Not even where only the record is to be written again, after a chunk that was skipped."""
    server = faulty.start(write_delay=0.0)
    server.sessions.create("repo", TTTParams())
    state = server.teach("repo")
    server.sessions.flush()
    faults(faulty).error = errno.ENOSPC
    server.sessions.get("repo").chunks += 1
    server.tick_until(lambda: server.stats.failures >= 3)
    store = SessionStore(open_files(faulty.url), stores.make_codec(faulty.directory), 3)
    loaded = store.load("repo")
    assert (loaded.facts.version, loaded.damaged) == (1, ())
    assert same(loaded.state, state)


def test_version_that_could_not_be_written_takes_no_room(faulty: Place, tmp_path: Path) -> None:
    server = faulty.start(write_delay=0.0)
    server.sessions.create("repo", TTTParams())
    server.sessions.flush()
    before = sorted(path.name for path in (tmp_path / "repo").rglob("*"))
    faults(faulty).error = errno.ENOSPC
    server.teach("repo")
    server.tick_until(lambda: server.stats.failures >= 2)
    assert sorted(path.name for path in (tmp_path / "repo").rglob("*")) == before


def test_store_that_works_again_is_used_at_the_end_whatever_failed_before(faulty: Place) -> None:
    server = faulty.start(write_delay=0.0)
    server.sessions.create("repo", TTTParams())
    server.sessions.flush()
    faults(faulty).error = errno.EIO
    server.teach("repo")
    server.tick_until(lambda: server.stats.failures >= 4)  # the next attempt is seconds away
    faults(faulty).error = None
    assert server.sessions.close(1.0) == []


def test_no_memory_for_the_copy_is_a_commit_that_failed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = place.start(write_delay=0.0)
    server.sessions.create("repo", TTTParams())
    server.teach("repo")

    def full(*args: object) -> AdapterState:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(server.bank, "state", full)
        server.tick_until(lambda: server.stats.failures >= 1)
    server.tick_until(lambda: server.stats.unsaved == 0)
    assert server.stats.commits >= 1
