"""A session's record of what happened to it."""

from __future__ import annotations

import pytest

from ponderttt.adaptation.actions import NOMINAL, Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import InvalidRequestError
from ponderttt.sessions.session import MAX_LEARNED, Session, check_session_id

MODELS = {"nominal": NOMINAL, "measured": NOMINAL}


def make_session(*, ephemeral: bool = False) -> Session:
    return Session("repo", TTTParams(), ephemeral=ephemeral, state=None)


@pytest.mark.parametrize("name", ["a", "7", "my-repo", "A.b_c-9", "x" * 128])
def test_session_id_of_allowed_characters_is_taken(name: str) -> None:
    check_session_id("id", name)


@pytest.mark.parametrize(
    "name",
    [
        "", "-a", ".a", "_a", "a/b", "../a", "a b", "a\n", "ä", "a\x00", "x" * 129, "request:1",
    ],
)  # fmt: skip
def test_session_id_of_other_characters_is_refused_by_field(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_session_id("ttt.session", name)
    assert caught.value.param == "ttt.session"
    assert "1 to 128" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_session_for_one_request_has_no_id() -> None:
    assert make_session().id == "repo"
    assert make_session(ephemeral=True).id is None


def test_session_remembers_what_it_learned_and_forgets_the_oldest_first() -> None:
    session = make_session()
    for number in range(MAX_LEARNED + 2):
        session.remember(f"chunk-{number}", 16)
    assert not session.has_learned("chunk-0")
    assert not session.has_learned("chunk-1")
    assert session.has_learned("chunk-2")
    assert session.has_learned(f"chunk-{MAX_LEARNED + 1}")
    assert len(session.learned) == MAX_LEARNED
    assert session.learned_tokens == 16 * (MAX_LEARNED + 2)


def test_record_of_the_first_loss_is_the_average_and_later_ones_move_it() -> None:
    session = make_session()
    session.record(2.0, 3.0)
    assert session.loss_ema == 2.0
    assert session.cost_ema == pytest.approx(0.9 * 1.0 + 0.1 * 3.0)
    session.record(3.0, 1.0)
    assert session.loss_ema == pytest.approx(0.9 * 2.0 + 0.1 * 3.0)
    assert session.chunks == 2


def test_record_of_a_chunk_without_a_loss_leaves_the_average() -> None:
    session = make_session()
    session.record(None, 1.0)
    assert (session.loss_ema, session.chunks) == (0.0, 1)
    session.record(2.0, 1.0)
    assert session.loss_ema == 2.0
    session.record(None, 1.0)
    assert session.loss_ema == 2.0


def test_history_of_a_session_tells_the_features_its_past() -> None:
    session = make_session()
    session.record(2.0, 3.0)
    history = session.history(2.5, -0.5, 7)
    assert (history.budget, history.credit, history.ahead) == (2.5, -0.5, 7)
    assert (history.loss_ema, history.cost_ema) == (session.loss_ema, session.cost_ema)
    assert session.history(None, 0.0, 0).budget == 12.0


def test_updates_of_a_session_are_the_chunks_that_were_not_skipped() -> None:
    session = make_session()
    for action in (Action.SKIP, Action.UPDATE_1, Action.UPDATE_4, Action.SKIP):
        session.ledger.charge(action, MODELS, 0.1)
    assert session.updates == 2
