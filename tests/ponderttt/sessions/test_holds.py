"""One server has a session's lock, for as long as anything there wants it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import pytest

from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import (
    ConflictError,
)
from ponderttt.sessions.session import Session
from tests.ponderttt.sessions.servers import Place, Server, faults


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
    third.sessions._roster._sessions.clear()
    with pytest.raises(ConflictError):
        third.sessions.create("repo", TTTParams())


def test_claimed_session_is_deleted_without_waiting_for_the_store(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = place.start()
    server.sessions.create("repo", TTTParams())
    server.sessions.close()
    server = place.start()
    server.sessions.ahead.claim_to_delete("repo")
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
    server.sessions.ahead.end_claim("repo")
    assert deleted is not None
    deleted.result()
    assert not server.vault._store.exists("repo")
    server.tick_until(lambda: server.vault.holds._locks.held() == [])


def test_claim_that_comes_to_nothing_leaves_the_session_to_others(place: Place) -> None:
    server = place.start()
    server.sessions.create("repo", TTTParams())
    server.sessions.close()
    server = place.start()
    server.sessions.ahead.claim_to_delete("repo")
    other = place.start()
    with pytest.raises(ConflictError):
        other.sessions.ahead.claim_to_delete("repo")
    assert not other.vault.holds.is_claimed("repo")
    server.sessions.ahead.end_claim("repo")
    assert other.sessions.warm("repo").version == 0


def test_claim_lasts_until_the_last_of_several_deletions_ends_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = place.start()
    for name in ("gone", "stays"):
        server.sessions.create(name, TTTParams())
    server.sessions.close()
    server = place.start()
    holds = server.vault.holds
    for name in ("gone", "gone", "stays", "stays"):
        holds.claim_to_delete(name)
    for name in ("gone", "stays"):
        holds.end_claim(name)
        holds.check(name)
    with monkeypatch.context() as patch:
        # What the engine's thread would wait for.
        patch.setattr(holds, "claim", lambda name: pytest.fail(f"{name} is claimed anew"))
        assert server.sessions.delete("gone") is not None
    for name in ("gone", "stays"):
        holds.end_claim(name)
        assert not holds.is_claimed(name)
    server.tick_until(lambda: holds._locks.held() == [])


def test_of_two_that_want_a_stored_name_both_are_refused(faulty: Place) -> None:
    server = faulty.start()
    other = Place(faulty.directory, faulty.url).start()
    other.sessions.create("repo", TTTParams())
    other.sessions.close()
    faults(faulty).seconds = 0.05
    refused: list[str] = []

    def reserve() -> None:
        try:
            server.sessions.ahead.reserve("repo")
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
    assert server.vault.holds._locks.held() == []


def test_name_of_a_deleted_session_is_free_once_it_is_gone(place: Place) -> None:
    server = place.start()
    server.sessions.create("repo", TTTParams())
    server.sessions.flush()
    deleted = server.sessions.delete("repo")
    assert deleted is not None
    deleted.result()
    server.sessions.ahead.reserve("repo")
    assert server.sessions.create("repo", TTTParams()).version == 0


# --- giving a lock back while the session moves on ------------------------------------------------

#: More than there are places in which a name is looked for: reservations, claims, fetches, writes,
#: deletions. The search ends where it is found, so that later moments never come.
_MOMENTS = 8


class _Watched(str):
    """A name that does something just before it is looked up in one place after so many others."""

    def __new__(cls, name: str, others: int, act: Callable[[], object]) -> _Watched:
        watched = super().__new__(cls, name)
        watched.others, watched.act = others, act
        return watched

    others: int
    act: Callable[[], object]

    def __hash__(self) -> int:
        self.others -= 1
        if self.others == -1:
            self.act()
        return super().__hash__()

    @property
    def acted(self) -> bool:
        """Whether it was looked up often enough."""
        return self.others < 0


def _nothing_is_done(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs wait forever; deletions would take the lock anew."""
    monkeypatch.setattr(server.vault._writers, "submit", lambda *job, **options: Future[None]())


def test_lock_is_kept_at_whatever_moment_a_reserved_name_is_used(place: Place) -> None:
    server = place.start()
    vault = server.vault

    def enter(name: str) -> None:
        """The end of `track_new`."""
        vault.writes.track(Session(name, TTTParams(), ephemeral=False, state=None))
        vault.holds.fulfil_reservation(name)

    came: list[int] = []
    for moment in range(_MOMENTS):
        name = f"repo-{moment}"
        server.sessions.ahead.reserve(name)
        watched = _Watched(name, moment, partial(enter, name))
        vault.holds.let_go(watched)
        came += [moment] * watched.acted
        vault.holds.check(name)
    assert came == [0]


def test_lock_is_kept_at_whatever_moment_a_fetched_session_is_taken_in(place: Place) -> None:
    server = place.start()
    names = [f"repo-{moment}" for moment in range(_MOMENTS)]
    for name in names:
        server.sessions.create(name, TTTParams())
    server.sessions.close()
    server = place.start()
    came: list[int] = []
    for moment, name in enumerate(names):
        loaded = server.sessions.ahead.fetch(name).result()
        watched = _Watched(name, moment, partial(server.sessions.warm, name, loaded))
        server.vault.holds.let_go(watched)
        came += [moment] * watched.acted
        server.vault.holds.check(name)
    assert came == [0, 1, 2]


@pytest.mark.parametrize("claimed", [False, True])
def test_lock_is_kept_at_whatever_moment_a_deletion_begins(
    place: Place, monkeypatch: pytest.MonkeyPatch, claimed: bool
) -> None:
    server = place.start()
    names = [f"repo-{moment}" for moment in range(_MOMENTS)]
    for name in names:
        server.sessions.create(name, TTTParams())
    if claimed:
        server.sessions.close()
        server = place.start()
    _nothing_is_done(server, monkeypatch)
    ended: list[threading.Thread] = []

    def delete(name: str) -> None:
        server.sessions.delete(name)
        if claimed:
            ending = threading.Thread(target=server.sessions.ahead.end_claim, args=(name,))
            ending.start()
            ending.join(0.1)  # it may have to wait for whoever gives the lock back
            ended.append(ending)

    came: list[int] = []
    for moment, name in enumerate(names):
        if claimed:
            server.sessions.ahead.claim_to_delete(name)
        watched = _Watched(name, moment, partial(delete, name))
        server.vault.holds.let_go(watched)
        came += [moment] * watched.acted
        for ending in ended:
            ending.join()
        server.vault.holds.check(name)
    assert came == ([0, 1] if claimed else [0, 1, 2, 3])


@pytest.mark.parametrize("fetched", [False, True])
def test_lock_is_kept_between_the_use_of_a_session_and_its_deletion(
    place: Place, monkeypatch: pytest.MonkeyPatch, fetched: bool
) -> None:
    server = place.start()
    server.sessions.create("repo", TTTParams())
    if fetched:
        server.sessions.close()
        server = place.start()
        server.sessions.ahead.fetch("repo").result()
    _nothing_is_done(server, monkeypatch)
    vault, begin = server.vault, server.vault._deletions.begin

    def begin_late(name: str, job: Future[object] | None, unused_since: float | None) -> object:
        vault.holds.let_go("repo")
        vault.holds.check("repo")
        return begin(name, job, unused_since)  # type: ignore[arg-type]

    monkeypatch.setattr(vault._deletions, "begin", begin_late)
    server.sessions.delete("repo")
    vault.holds.let_go("repo")
    vault.holds.check("repo")


def test_lock_is_kept_where_a_reservation_is_cancelled_while_it_is_used(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = place.start()
    holds = server.vault.holds
    reserve = holds.reserve

    def reserve_and_cancel(name: str, check_free: Callable[[str], None]) -> None:
        reserve(name, check_free)
        holds.cancel_reservation(name)

    monkeypatch.setattr(holds, "reserve", reserve_and_cancel)
    server.sessions.create("repo", TTTParams())
    holds.check("repo")


def test_name_that_is_taken_elsewhere_is_not_here(place: Place) -> None:
    server, other = place.start(), place.start()
    other.sessions.create("repo", TTTParams())
    with pytest.raises(ConflictError):
        server.sessions.create("repo", TTTParams())
    assert server.sessions.here() == []
    other.sessions.close()
    with pytest.raises(ConflictError, match="exists already"):
        server.sessions.create("repo", TTTParams())
    assert server.vault.holds._locks.held() == []
