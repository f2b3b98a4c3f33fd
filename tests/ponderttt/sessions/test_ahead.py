"""What other threads prepare; what comes of it with a store is in the tests of its parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import ConflictError, InvalidRequestError, NotFoundError
from ponderttt.sessions.manager import SessionManager
from tests.ponderttt.sessions import stores
from tests.ponderttt.sessions.servers import Place


def test_without_a_store_there_is_little_to_prepare(tiny_llama_dir: Path) -> None:
    sessions = SessionManager(stores.make_bank(tiny_llama_dir), 4)
    sessions.create("repo", TTTParams())
    ahead = sessions.ahead
    assert (ahead.reserve("new"), ahead.listing()) == ("new", None)
    assert ahead.reserve(None) != ahead.reserve(None)
    assert not ahead.is_cold("repo")
    assert not ahead.is_unknown("nobody")
    for nothing in (ahead.cancel_reservation, ahead.claim_to_delete, ahead.end_claim, ahead.leave):
        nothing("repo")
    with pytest.raises(NotFoundError, match="'repo' is not stored"):
        ahead.fetch("repo")
    with pytest.raises(NotFoundError, match="'nobody' does not exist"):
        ahead.fetch("nobody")
    with pytest.raises(ConflictError, match="--sessions DIRECTORY"):
        ahead.read_version("repo", 0)
    assert sessions.names() == ["repo"]


def test_reservation_is_checked_kept_and_let_go(place: Place) -> None:
    server = place.start()
    with pytest.raises(InvalidRequestError):
        server.sessions.ahead.reserve("a/b")
    name = server.sessions.ahead.reserve(None)
    with pytest.raises(ConflictError):
        place.start().sessions.ahead.reserve(name)
    server.sessions.ahead.cancel_reservation(name)
    assert server.vault.holds._locks.held() == []
    assert server.files.names("~locks") == []
    server.sessions.create(name, TTTParams())
    # It was used.
    server.sessions.ahead.cancel_reservation(name)
    assert server.vault.holds._locks.held() == [name]


def test_cold_and_unknown_are_told_apart(place: Place) -> None:
    server = place.start()
    server.sessions.create("repo", TTTParams())
    server.sessions.flush()
    ahead = server.sessions.ahead
    assert [ahead.is_cold(name) for name in ("repo", "nobody")] == [False, True]
    assert [ahead.is_unknown(name) for name in ("repo", "nobody")] == [False, True]
    server.upkeep.put_away(server.sessions.get("repo"))
    assert ahead.is_cold("repo")
    loaded = ahead.fetch("repo").result()
    assert ahead.has_fetched("repo", loaded)
    server.sessions.warm("repo", loaded)
    assert not ahead.has_fetched("repo", loaded)
    assert not ahead.is_cold("repo")
