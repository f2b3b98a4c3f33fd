"""Names of sessions, with and without a key's id before them."""

from __future__ import annotations

import pytest

from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import InvalidRequestError
from ponderttt.sessions.names import (
    check_plain_name,
    check_session_id,
    key_id_of,
    new_session_id,
    plain_name,
    qualified_name,
)
from ponderttt.sessions.session import Session


@pytest.mark.parametrize("key_id", [None, "alice", "0", "a_b-c", "k" * 32])
@pytest.mark.parametrize("name", ["repo", "A.b-c_d", "n" * 128, new_session_id()])
def test_name_and_key_are_found_again_in_the_qualified_name(key_id: str | None, name: str) -> None:
    qualified = qualified_name(key_id, name)
    check_session_id("id", qualified)
    assert (key_id_of(qualified), plain_name(qualified)) == (key_id, name)
    session = Session(qualified, TTTParams(), ephemeral=False, state=None)
    assert (session.key_id, session.id) == (key_id, name)


@pytest.mark.parametrize(
    "name",
    ["~a", "A~a", "../x~a", "x/y~a", "a~", "a~../b", "a~b~c", "a~.b", "k" * 33 + "~a", "a\n~b"],
)
def test_qualified_name_that_could_lead_astray_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        check_session_id("id", name)


def test_plain_name_has_no_key() -> None:
    check_plain_name("id", "repo")
    with pytest.raises(InvalidRequestError, match="1 to 128"):
        check_plain_name("id", "alice~repo")


def test_weights_of_one_request_belong_to_no_key() -> None:
    session = Session("request:a~b", TTTParams(), ephemeral=True, state=None)
    assert (session.key_id, session.id) == (None, None)
