"""Sessions with a store: they come back as they were, whatever happens to server or store."""

from __future__ import annotations

import errno
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ponderttt.adaptation.actions import NOMINAL, Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import (
    ConflictError,
    DamagedSessionError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    StoreError,
)
from ponderttt.fast_weights.bank import BASE_SLOT, AdapterBank, AdapterState, StepTag
from ponderttt.sessions.config import StoreConfig
from ponderttt.sessions.files import Files, open_files
from ponderttt.sessions.manager import SessionManager
from ponderttt.sessions.record import RECORD_FILE
from ponderttt.sessions.session import Session
from ponderttt.sessions.store import SessionStore
from ponderttt.sessions.vault import StoreStats
from tests.ponderttt.sessions import stores
from tests.ponderttt.sessions.stores import FaultyFiles, same

COSTS = {"nominal": NOMINAL, "measured": NOMINAL}


@dataclass
class Server:
    """What one server holds."""

    bank: AdapterBank
    sessions: SessionManager
    files: Files

    def teach(self, name: str) -> AdapterState:
        """Commit some state as a write would, with all that goes with it."""
        session = self.sessions.warm(name)
        assert self.sessions.acquire(session)
        state = _state(self.bank, name, session.version + 1)
        tag = StepTag(session.slot, session.owner, session.version, "WRITE")
        session.version = self.bank.commit(tag, state)
        session.remember(f"{name}-{session.version}", 64)
        session.record(1.0 + session.version, 3.0)
        session.ledger.charge(Action.UPDATE_1, COSTS, 0.25)
        session.threshold.offset += 0.125
        self.sessions.release(session)
        return state

    @property
    def stats(self) -> StoreStats:
        stats = self.sessions.store_stats()
        assert stats is not None
        return stats

    def tick_until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Let time pass until `condition()` holds."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"not within {seconds} s: {self.stats}"
            self.sessions.tick()
            time.sleep(0.005)


@dataclass
class Place:
    """Where servers keep their sessions."""

    directory: Path
    url: str
    files: Files | None = None

    def start(self, slots: int = 2, **config: float | int | None) -> Server:
        """A server that begins with what is stored."""
        files = self.files or open_files(self.url)
        settings = StoreConfig(self.url, **config)  # type: ignore[arg-type]
        bank = stores.make_bank(self.directory, slots)
        sessions = SessionManager(bank, 16)
        store = SessionStore(files, stores.make_codec(self.directory), settings.keep_versions)
        sessions.attach(store, settings)
        return Server(bank, sessions, files)


def _state(bank: AdapterBank, name: str, number: int) -> AdapterState:
    seed = sum(name.encode()) * 1000 + number
    noise = torch.randn(3, bank.layout.size, generator=torch.Generator().manual_seed(seed))
    return AdapterState(bank.fresh_weights + 0.01 * noise[0], noise[1], noise[2].abs(), number)


def facts(session: Session) -> dict[str, object]:
    """Everything about a session that must survive."""
    names = ("owner", "defaults", "version", "ledger", "threshold", "learned",
             "loss_ema", "cost_ema", "chunks", "learned_tokens", "rollbacks", "created",
             "pinned")  # fmt: skip
    return {name: getattr(session, name) for name in names}


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path: Path) -> Place:
    """On local disk, and on another file system of fsspec."""
    url = str(tmp_path / "store") if request.param == "local" else stores.memory_url()
    return Place(tiny_llama_dir, url)


@pytest.fixture
def faulty(tiny_llama_dir: Path, tmp_path: Path) -> Place:
    """On local disk, with faults that can be switched on."""
    return Place(tiny_llama_dir, str(tmp_path), FaultyFiles(tmp_path))


def faults(place: Place) -> stores.Faults:
    assert isinstance(place.files, FaultyFiles)
    return place.files.faults


# --- restarts -------------------------------------------------------------------------------------


def test_session_is_the_same_after_a_restart(place: Place) -> None:
    first = place.start()
    defaults = TTTParams(session="any", gate="fixed", action=Action.UPDATE_2, budget=3.5,
                         chunk_size=64, when="background", seed=7)  # fmt: skip
    first.sessions.create("repo", defaults)
    first.sessions.create("idle", TTTParams())
    for _ in range(3):
        state = first.teach("repo")
    before = facts(first.sessions.get("repo"))
    assert first.sessions.close() == []

    second = place.start()
    assert second.sessions.names() == ["repo", "idle"]
    after = facts(second.sessions.get("repo"))
    before["defaults"] = after["defaults"]
    assert after == before
    kept = second.sessions.get("repo").defaults
    assert (kept.gate, kept.action, kept.budget) == ("fixed", Action.UPDATE_2, 3.5)
    assert (kept.chunk_size, kept.when, kept.seed) == (64, "background", 7)
    assert second.sessions.get("repo").cold
    assert same(second.sessions.state(second.sessions.get("repo")), state)
    fresh = second.sessions.state(second.sessions.get("idle"))
    assert torch.equal(fresh.weights, second.bank.fresh_weights)


def test_sessions_are_counted_by_the_key_that_made_them(place: Place) -> None:
    first = place.start()
    for name in ("k1~a", "k1~b", "c"):
        first.sessions.create(name, TTTParams())
    first.sessions.fork("k1~a", "k2~d")
    first.sessions.fork("k1~a", "k1~e")
    first.sessions.delete("k1~b")
    first.sessions.close()
    second = place.start()
    for server in (first, second):
        counts = [server.sessions.count(key) for key in ("k1", "k2", None, "k3")]
        assert counts == [2, 1, 1, 0]
    second.sessions.warm("k1~a")
    assert second.sessions.count("k1") == 2


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


# --- bank, RAM, store -----------------------------------------------------------------------------


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
            server.sessions._trim(server.sessions._open_vault())
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
        server.sessions._trim(server.sessions._open_vault())
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
    one.tick_until(lambda: not one.sessions._open_vault()._locks.held())
    other.teach("repo")
    assert other.sessions.get("repo").version == 2
    with pytest.raises(ConflictError, match="in use by another server"):
        one.sessions.warm("repo")
    other.sessions.close()
    one.teach("repo")
    assert one.sessions.get("repo").version == 3
    assert one.sessions.get("repo").learned.keys() == {f"repo-{i}" for i in (1, 2, 3)}


def test_two_servers_never_share_a_session(place: Place) -> None:
    one = place.start()
    one.sessions.create("repo", TTTParams())
    one.sessions.flush()
    other = place.start()
    assert other.sessions.names() == ["repo"]
    acts: list[Callable[[], object]] = [
        lambda: other.sessions.warm("repo"),
        lambda: other.sessions.delete("repo"),
        lambda: other.sessions.fork("repo", "twin"),
        lambda: other.sessions.acquire(other.sessions.get("repo")),
        lambda: other.sessions.rollback("repo", 0),
    ]
    for act in acts:
        with pytest.raises(ConflictError, match="in use by another server"):
            act()
    with pytest.raises(ConflictError, match="'repo' exists already"):
        other.sessions.create("repo", TTTParams())
    third = place.start()
    third.sessions._sessions.clear()
    with pytest.raises(ConflictError):
        third.sessions.create("repo", TTTParams())


def test_server_whose_lease_was_taken_writes_nothing_more(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    one = place.start(write_delay=0.0)
    one.sessions.create("repo", TTTParams())
    one.sessions.flush()
    reset: list[Session] = []
    one.sessions.on_reset = reset.append
    one.sessions._open_vault()._locks.release("repo")  # as if it had expired
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


# --- fork, snapshot, roll back, delete ------------------------------------------------------------


def test_rollback_is_a_new_version_with_the_old_content(place: Place) -> None:
    server = place.start()
    server.sessions.create("repo", TTTParams())
    states = [server.sessions.state(server.sessions.get("repo"))]
    server.sessions.flush()
    for _ in range(4):
        states.append(server.teach("repo"))
        server.sessions.flush()
    session = server.sessions.get("repo")
    assert session.kept == (2, 3, 4)
    seconds = session.ledger.seconds
    server.sessions.rollback("repo", 2)
    assert session.version == 5
    assert same(server.sessions.state(session), states[2])
    assert list(session.learned) == ["repo-1", "repo-2"]
    assert (session.learned_tokens, session.threshold.offset) == (128, 0.25)
    # What was spent is spent.
    assert (session.ledger.seconds, session.chunks) == (seconds, 4)
    server.sessions.flush()
    assert session.kept == (3, 4, 5)
    server.sessions.close()
    again = place.start()
    assert same(again.sessions.state(again.sessions.get("repo")), states[2])
    assert again.sessions.get("repo").version == 5


def test_rollback_to_what_is_not_kept_changes_nothing(place: Place) -> None:
    server = place.start()
    server.sessions.create("repo", TTTParams())
    server.sessions.flush()
    state = server.teach("repo")
    server.sessions.flush()
    with pytest.raises(NotFoundError, match=r"version 9 .* is not kept; kept are 0, 1") as caught:
        server.sessions.rollback("repo", 9)
    assert caught.value.param == "version"
    assert same(server.sessions.state(server.sessions.get("repo")), state)
    assert server.sessions.acquire(server.sessions.get("repo"))
    with pytest.raises(ConflictError, match="in use by 1 requests"):
        server.sessions.rollback("repo", 0)


def test_snapshots_are_kept_until_newer_ones_replace_them(place: Place) -> None:
    server = place.start(keep_versions=2)
    server.sessions.create("repo", TTTParams())
    for number in range(1, 9):
        server.teach("repo")
        if number in (1, 3, 5):
            server.sessions.snapshot("repo")
            server.sessions.snapshot("repo")
        server.sessions.flush()
    session = server.sessions.get("repo")
    assert session.pinned == [3, 5]
    assert session.kept == (3, 5, 7, 8)


def test_without_a_store_there_is_nothing_to_go_back_to(tiny_llama_dir: Path) -> None:
    sessions = SessionManager(stores.make_bank(tiny_llama_dir), 4)
    sessions.create("repo", TTTParams())
    acts: list[Callable[[], object]] = [
        lambda: sessions.rollback("repo", 0),
        lambda: sessions.snapshot("repo"),
    ]
    for act in acts:
        with pytest.raises(ConflictError, match="--sessions DIRECTORY"):
            act()
    assert (sessions.flush(), sessions.close(), sessions.next_due()) == ([], [], None)
    assert sessions.delete("repo") is None


def test_fork_is_stored_on_its_own(place: Place) -> None:
    server = place.start()
    server.sessions.create("repo", TTTParams())
    state = server.teach("repo")
    server.sessions.fork("repo", "twin")
    server.teach("repo")
    server.sessions.close()
    again = place.start()
    assert same(again.sessions.state(again.sessions.get("twin")), state)
    assert again.sessions.get("repo").version == 2


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
    server.tick_until(lambda: not server.sessions._open_vault()._deletions)
    assert server.sessions.create("repo", TTTParams()).version == 0
    server.sessions.close()
    assert place.start().sessions.get("repo").version == 0


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
    one.sessions._put_away(one.sessions._open_vault(), session)
    session.last_used -= 100.0  # all that this server knows
    one.sessions.tick()
    assert one.sessions.names() == []
    one.tick_until(lambda: not one.sessions._open_vault()._deletions)
    assert one.sessions.warm("repo").version == 0


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


def test_creating_a_session_in_a_broken_store_fails_for_that_session_alone(faulty: Place) -> None:
    server = faulty.start()
    server.sessions.create("good", TTTParams())
    server.sessions.flush()
    faults(faulty).reads = errno.EIO
    session = server.sessions.get("good")
    server.sessions._put_away(server.sessions._open_vault(), session)
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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("url", ""), ("keep_versions", 0), ("ram_sessions", -1), ("write_delay", -1.0),
        ("write_delay", float("nan")), ("idle_seconds", float("inf")), ("ttl", 0.0),
    ],
)  # fmt: skip
def test_setting_out_of_range_is_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        StoreConfig(**({"url": "somewhere"} | {field: value}))  # type: ignore[arg-type]
    assert caught.value.param == ("sessions" if field == "url" else field)


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


# --- races ----------------------------------------------------------------------------------------


def test_what_was_fetched_before_a_deletion_does_not_bring_the_session_back(place: Place) -> None:
    server = place.start()
    server.sessions.create("repo", TTTParams())
    server.teach("repo")
    server.sessions.close()
    server = place.start()
    loaded = server.sessions.fetch("repo").result()
    deleted = server.sessions.delete("repo")
    assert deleted is not None
    with pytest.raises(NotFoundError):
        server.sessions.warm("repo", loaded)
    deleted.result()
    server.tick_until(lambda: not server.sessions._open_vault()._deletions)
    with pytest.raises(NotFoundError):
        server.sessions.fetch("repo").result()
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
    reading = server.sessions.fetch("repo")
    deleted = server.sessions.delete("repo")
    assert deleted is not None
    deleted.result()
    with pytest.raises(NotFoundError):
        reading.result()
    server.tick_until(lambda: not server.sessions._open_vault()._deletions)
    assert server.sessions._open_vault()._locks.held() == []


def test_deletion_that_was_cut_short_is_finished_by_the_next_server(place: Place) -> None:
    server = place.start()
    for name in ("gone", "there"):
        server.sessions.create(name, TTTParams())
    server.sessions.close()
    server.files.write("gone/deleted", b"")
    server = place.start()
    assert server.sessions.names() == ["there"]
    server.tick_until(lambda: server.files.names("gone") == [])
    server.tick_until(lambda: not server.sessions._open_vault()._deletions)
    assert server.sessions.create("gone", TTTParams()).version == 0


def test_deletion_that_another_server_is_at_is_left_to_it(place: Place) -> None:
    server = place.start()
    server.sessions.create("gone", TTTParams())
    server.sessions.flush()
    server.files.write("gone/deleted", b"")  # and is stopped here, with the lock
    other = place.start()
    other.tick_until(lambda: not other.sessions._open_vault()._deletions)
    assert len(server.files.names("gone")) > 1
    assert other.sessions.names() == []


def test_claimed_session_is_deleted_without_waiting_for_the_store(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = place.start()
    server.sessions.create("repo", TTTParams())
    server.sessions.close()
    server = place.start()
    server.sessions.claim_to_delete("repo")
    here = threading.get_ident()
    waited: list[str] = []

    def watched(name: str, method: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            if threading.get_ident() == here:
                waited.append(name)
            return method(*args)

        return call

    files = server.files
    for name in ("read", "names", "write", "replace", "create", "remove"):
        monkeypatch.setattr(files, name, watched(name, getattr(files, name)))
    deleted = server.sessions.delete("repo")
    assert waited == []
    server.sessions.end_claim("repo")
    assert deleted is not None
    deleted.result()
    assert not server.sessions._open_vault()._store.exists("repo")
    server.tick_until(lambda: server.sessions._open_vault()._locks.held() == [])


def test_claim_that_comes_to_nothing_leaves_the_session_to_others(place: Place) -> None:
    server = place.start()
    server.sessions.create("repo", TTTParams())
    server.sessions.close()
    server = place.start()
    server.sessions.claim_to_delete("repo")
    other = place.start()
    with pytest.raises(ConflictError):
        other.sessions.claim_to_delete("repo")
    server.sessions.end_claim("repo")
    assert other.sessions.warm("repo").version == 0


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


@pytest.mark.parametrize("refreshed", [False, True])
def test_session_made_anew_by_another_server_is_not_taken_for_the_old_one(
    place: Place, refreshed: bool
) -> None:
    server = place.start(write_delay=0.0, idle_seconds=0.0)
    reset: list[str] = []
    server.sessions.on_reset = lambda session: reset.append(session.owner)
    for name in ("same", "new"):
        server.sessions.create(name, TTTParams())
        server.teach(name)
    server.tick_until(lambda: all(server.sessions.get(n).cold for n in ("same", "new")))
    server.tick_until(lambda: server.sessions._open_vault()._locks.held() == [])
    other = place.start()
    deleted = other.sessions.delete("new")
    assert deleted is not None
    deleted.result()
    other.sessions.create("new", TTTParams())
    other.teach("new")
    assert other.sessions.close() == []
    if refreshed:
        server.sessions.refresh(server.sessions.listing())
        assert reset == ["new"]
    assert server.sessions.warm("same").version == server.sessions.warm("new").version == 1
    assert reset == ["new"]


def test_session_of_another_server_counts_against_the_limit_of_this_one(place: Place) -> None:
    server, other = place.start(), place.start()
    for number in range(16):
        server.sessions.create(f"mine-{number}", TTTParams())
    other.sessions.create("theirs", TTTParams())
    other.sessions.close()
    with pytest.raises(OverloadedError, match="16 sessions exist"):
        server.sessions.warm("theirs")
    server.sessions.delete("mine-0")
    assert server.sessions.warm("theirs").version == 0


def test_of_two_that_want_a_stored_name_both_are_refused(faulty: Place) -> None:
    server = faulty.start()
    other = Place(faulty.directory, faulty.url).start()
    other.sessions.create("repo", TTTParams())
    other.sessions.close()
    faults(faulty).seconds = 0.05
    refused: list[str] = []

    def reserve() -> None:
        try:
            server.sessions.reserve("repo")
        except ConflictError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=reserve) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert len(refused) == 2
    assert all("exists already" in reason for reason in refused)
    assert server.sessions._open_vault()._locks.held() == []


def test_name_of_a_deleted_session_is_free_once_it_is_gone(place: Place) -> None:
    server = place.start()
    server.sessions.create("repo", TTTParams())
    server.sessions.flush()
    deleted = server.sessions.delete("repo")
    assert deleted is not None
    deleted.result()
    server.sessions.reserve("repo")
    assert server.sessions.create("repo", TTTParams()).version == 0
