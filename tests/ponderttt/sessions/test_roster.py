"""Which sessions there are, by name and by key."""

from __future__ import annotations

import pytest

from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import (
    ConflictError,
    DamagedSessionError,
    NotFoundError,
    OverloadedError,
)
from ponderttt.sessions.roster import Roster
from ponderttt.sessions.session import Session


def make_session(name: str) -> Session:
    return Session(name, TTTParams(), ephemeral=False, state=None)


def test_session_is_found_and_counted_until_it_is_removed() -> None:
    roster = Roster(8)
    sessions = [make_session(name) for name in ("k1~b", "k1~a", "c")]
    for session in sessions:
        roster.add(session)
    assert list(roster) == sessions
    assert roster.get("k1~a") is roster.find("k1~a") is sessions[1]
    assert [roster.count(key) for key in ("k1", None, "k2")] == [2, 1, 0]
    for session in roster:
        roster.remove(session)
    assert (len(roster), roster.count("k1"), roster.find("c")) == (0, 0, None)
    with pytest.raises(NotFoundError, match="'c' does not exist"):
        roster.get("c")


def test_name_of_a_session_that_can_not_be_read_is_taken() -> None:
    roster = Roster(8)
    roster.unreadable["bad"] = "session 'bad' can't be read"
    assert roster.is_known("bad")
    assert roster.find("bad") is None
    with pytest.raises(DamagedSessionError, match="can't be read"):
        roster.get("bad")
    with pytest.raises(ConflictError, match="exists already"):
        roster.check_new("bad")


def test_taken_name_is_told_before_there_is_no_room() -> None:
    roster = Roster(1)
    roster.check_new("a")
    roster.add(make_session("a"))
    with pytest.raises(ConflictError):
        roster.check_new("a")
    with pytest.raises(OverloadedError, match="1 sessions"):
        roster.check_new("b")
