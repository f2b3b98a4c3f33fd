"""Sessions with a store: they come back as they were, and so do their earlier versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import (
    ConflictError,
    NotFoundError,
    OverloadedError,
)
from ponderttt.sessions.manager import SessionManager
from tests.ponderttt.sessions import stores
from tests.ponderttt.sessions.servers import Place, facts
from tests.ponderttt.sessions.stores import same

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


# --- fork, snapshot, roll back --------------------------------------------------------------------


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


# --- other servers --------------------------------------------------------------------------------


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
    server.tick_until(lambda: server.vault.holds._locks.held() == [])
    other = place.start()
    deleted = other.sessions.delete("new")
    assert deleted is not None
    deleted.result()
    other.sessions.create("new", TTTParams())
    other.teach("new")
    assert other.sessions.close() == []
    if refreshed:
        server.sessions.refresh(server.sessions.ahead.listing())
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
