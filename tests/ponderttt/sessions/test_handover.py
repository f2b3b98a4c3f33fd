"""Sessions that go from one server of a store to another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import NotFoundError, SessionElsewhereError
from ponderttt.sessions.config import StoreConfig
from ponderttt.sessions.files import LocalFiles
from ponderttt.sessions.handover import WANTED, WISH_SECONDS, Wishes
from ponderttt.sessions.manager import SessionManager
from ponderttt.sessions.vault import Vault
from tests.ponderttt.sessions import stores

MakeServer = Callable[..., "Server"]


@dataclass
class Server:
    """A manager as a replica has it: it looks for wishes often."""

    sessions: SessionManager

    @property
    def vault(self) -> Vault:
        return stores.attached(self.sessions).vault

    def tick_until(self, done: Callable[[], bool], seconds: float = 10.0) -> None:
        """Let the engine's thread go on until something has come about."""
        until = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < until
            self.sessions.tick()
            time.sleep(0.01)


@pytest.fixture(params=["file", "lease"])
def make_server(request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path: Path) -> MakeServer:
    """Makes servers of one store, on local disk or in memory."""
    url = str(tmp_path / "sessions") if request.param == "file" else stores.memory_url()

    def make(hand_over_seconds: float | None = 0.05) -> Server:
        manager = SessionManager(stores.make_bank(tiny_llama_dir), max_sessions=16)
        config = StoreConfig(url, write_delay=5.0, hand_over_seconds=hand_over_seconds)
        manager.attach(stores.make_store(tiny_llama_dir, url), config)
        return Server(manager)

    return make


def test_idle_session_is_saved_and_handed_over_when_another_server_asks(
    make_server: MakeServer,
) -> None:
    one, other = make_server(), make_server()
    session = one.sessions.create("repo", TTTParams())
    one.sessions.flush()
    one.sessions.acquire(session)
    session.version = 7  # learned, and not saved yet
    digest = one.sessions.digest(session)
    with pytest.raises(SessionElsewhereError, match="'repo' is in use by another server"):
        other.sessions.warm("repo")
    other.sessions.ahead.ask_for("repo")
    time.sleep(0.3)
    one.sessions.tick()
    assert one.sessions.here() == ["repo"]  # a request uses it
    one.sessions.release(session)
    one.tick_until(lambda: one.sessions.here() == [])
    one.tick_until(lambda: not one.vault.holds._locks.held())
    moved = other.sessions.warm("repo")
    assert (moved.version, other.sessions.digest(moved)) == (7, digest)
    assert other.vault._store.files.names(WANTED) == []
    with pytest.raises(SessionElsewhereError):
        one.sessions.warm("repo")


def test_server_that_hands_nothing_over_keeps_its_sessions(make_server: MakeServer) -> None:
    one, other = make_server(hand_over_seconds=None), make_server()
    one.sessions.create("repo", TTTParams())
    one.sessions.flush()
    other.sessions.ahead.ask_for("repo")
    for _ in range(20):
        one.sessions.tick()
        time.sleep(0.05)
    assert one.sessions.here() == ["repo"]


def test_session_that_was_just_made_elsewhere_is_found_before_it_is_stored(
    make_server: MakeServer,
) -> None:
    one, other = make_server(), make_server()
    one.sessions.create("repo", TTTParams())
    with pytest.raises(SessionElsewhereError):
        other.sessions.warm("repo")
    with pytest.raises(NotFoundError):
        other.sessions.warm("nobody")
    one.sessions.close()
    assert other.sessions.warm("repo").version == 0


def test_session_that_is_left_is_free_for_others(make_server: MakeServer) -> None:
    one, other = make_server(), make_server()
    one.sessions.create("repo", TTTParams())
    one.sessions.ahead.leave("repo")
    one.tick_until(lambda: not one.vault.holds._locks.held())
    assert other.sessions.warm("repo").version == 0


def test_session_that_is_not_here_can_be_left_at_any_moment(make_server: MakeServer) -> None:
    server = make_server()

    class Leaving(set[str]):
        """Another thread adds a name as soon as those that are not here are removed."""

        def intersection_update(self, *others: Iterable[object]) -> None:
            super().intersection_update(*others)
            server.sessions.ahead.leave("elsewhere")

    session = server.sessions.create("repo", TTTParams())
    server.vault._leaving = Leaving()
    server.sessions.ahead.leave("repo")
    assert server.vault.leaving() == [session]


def test_refresh_finds_what_other_servers_made_changed_and_deleted(
    make_server: MakeServer,
) -> None:
    one, other = make_server(), make_server()
    for name in ("stays", "goes"):
        one.sessions.create(name, TTTParams())
    one.sessions.flush()
    other.sessions.create("mine", TTTParams())
    assert other.sessions.names() == ["mine"]
    other.sessions.refresh(other.sessions.ahead.listing())
    assert sorted(other.sessions.names()) == ["goes", "mine", "stays"]
    assert other.sessions.here() == ["mine"]
    one.sessions.get("stays").version = 3
    deleted = one.sessions.delete("goes")
    assert deleted is not None
    deleted.result()
    one.sessions.flush()
    other.sessions.refresh(other.sessions.ahead.listing())
    assert sorted(other.sessions.names()) == ["mine", "stays"]
    assert other.sessions.get("stays").version == 3
    assert other.sessions.count(None) == 2
    with pytest.raises(NotFoundError):
        other.sessions.get("goes")


def test_wish_is_forgotten_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = LocalFiles(tmp_path)
    wishes, now = Wishes(files), time.time()
    wishes.ask_for("repo")
    wishes.ask_for("other")
    assert wishes.among(["repo"]) == ["repo"]
    wishes.fulfilled("repo")
    wishes.fulfilled("repo")
    assert wishes.among(["repo"]) == []
    monkeypatch.setattr(time, "time", lambda: now + WISH_SECONDS + 1)
    assert wishes.among(["other"]) == []
    assert files.names(WANTED) == []


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"asked": null}', b"\xff"])
def test_wish_that_can_not_be_read_is_none(tmp_path: Path, text: bytes) -> None:
    files = LocalFiles(tmp_path)
    files.replace(f"{WANTED}/repo", text)
    assert Wishes(files).among(["repo"]) == []
