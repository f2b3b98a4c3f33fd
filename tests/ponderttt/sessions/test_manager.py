"""Sessions in memory: their weights survive every move between bank and RAM bit by bit."""

from __future__ import annotations

import hashlib
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ponderttt.adaptation.actions import NOMINAL, Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import ConflictError, InvalidRequestError, NotFoundError, OverloadedError
from ponderttt.fast_weights.bank import BASE_SLOT, AdapterBank, AdapterState, StepTag
from ponderttt.fast_weights.layout import AdapterLayout, LoRAConfig
from ponderttt.sessions.manager import SessionManager
from ponderttt.sessions.session import Session
from tests.ponderttt.engine import harness


@dataclass
class House:
    """A bank of few slots and the sessions that share it."""

    bank: AdapterBank
    sessions: SessionManager
    draws: torch.Generator

    def teach(self, session: Session) -> AdapterState:
        """Commit some state as a write would."""
        held = self.sessions.acquire(session)
        assert held
        size = self.bank.layout.size
        weights, first, second = torch.randn(3, size, generator=self.draws)
        state = AdapterState(weights, first, second, step=session.version + 1)
        tag = StepTag(session.slot, session.owner, session.version, "WRITE")
        session.version = self.bank.commit(tag, state)
        self.sessions.release(session)
        return state.clone()


def make_house(directory: Path, slots: int = 2, limit: int = 8) -> House:
    decoder, _ = harness.load(directory)
    layout = AdapterLayout(decoder, LoRAConfig(rank=1, layers=1))
    bank = AdapterBank(layout, slots, decoder.device, decoder.dtype)
    return House(bank, SessionManager(bank, limit), torch.Generator().manual_seed(0))


@pytest.fixture
def house(tiny_llama_dir: Path) -> House:
    return make_house(tiny_llama_dir)


def same(one: AdapterState, two: AdapterState) -> bool:
    """Bit by bit."""
    pairs = ((one.weights, two.weights), (one.first, two.first), (one.second, two.second))
    return one.step == two.step and all(torch.equal(a, b) for a, b in pairs)


# --- creating and finding -------------------------------------------------------------------------


def test_create_with_a_name_finds_it_again(house: House) -> None:
    defaults = TTTParams(budget=2.5)
    session = house.sessions.create("repo", defaults)
    assert house.sessions.get("repo") is session
    assert session.defaults is defaults
    assert (session.version, session.slot, session.pins) == (0, BASE_SLOT, 0)
    assert house.bank.occupied == 0


def test_create_without_a_name_makes_one(house: House) -> None:
    names = {house.sessions.create(None, TTTParams()).owner for _ in range(5)}
    assert len(names) == 5
    assert set(house.sessions.names()) == names


def test_create_of_a_taken_name_is_a_conflict(house: House) -> None:
    first = house.sessions.create("repo", TTTParams())
    with pytest.raises(ConflictError, match="'repo' exists already") as caught:
        house.sessions.create("repo", TTTParams())
    assert caught.value.param == "id"
    assert house.sessions.get("repo") is first


def test_create_of_a_bad_name_is_refused(house: House) -> None:
    with pytest.raises(InvalidRequestError, match="id: "):
        house.sessions.create("a/b", TTTParams())
    assert len(house.sessions) == 0


def test_create_beyond_the_limit_is_refused_until_one_is_deleted(tiny_llama_dir: Path) -> None:
    sessions = make_house(tiny_llama_dir, limit=2).sessions
    sessions.create("a", TTTParams())
    sessions.create("b", TTTParams())
    with pytest.raises(OverloadedError, match="2 sessions"):
        sessions.create("c", TTTParams())
    with pytest.raises(OverloadedError, match="2 sessions"):
        sessions.fork("a", "c")
    sessions.delete("a")
    sessions.create("c", TTTParams())
    assert sessions.names() == ["b", "c"]


def test_get_of_an_unknown_name_is_not_found(house: House) -> None:
    with pytest.raises(NotFoundError, match="'repo' does not exist"):
        house.sessions.get("repo")


def test_fresh_session_differs_from_fresh_weights_by_nothing(house: House) -> None:
    session = house.sessions.create("repo", TTTParams())
    assert house.sessions.norm(session) == 0.0
    expected = hashlib.sha256(house.bank.fresh_weights.numpy().tobytes()).hexdigest()
    assert house.sessions.digest(session) == expected


def test_norm_and_digest_after_learning_are_those_of_the_weights(house: House) -> None:
    session = house.sessions.create("repo", TTTParams())
    state = house.teach(session)
    distance = torch.dist(state.weights, house.bank.fresh_weights)
    assert house.sessions.norm(session) == pytest.approx(float(distance))
    expected = hashlib.sha256(state.weights.numpy().tobytes()).hexdigest()
    assert house.sessions.digest(session) == expected


# --- pins, slots and eviction ---------------------------------------------------------------------


def test_acquire_puts_a_session_into_the_bank_and_counts_pins(house: House) -> None:
    session = house.sessions.create("repo", TTTParams())
    assert house.sessions.acquire(session)
    assert house.sessions.acquire(session)
    assert (session.pins, house.bank.occupied) == (2, 1)
    house.sessions.release(session)
    house.sessions.release(session)
    # Idle sessions stay where they are until somebody needs the slot.
    assert (session.pins, house.bank.occupied) == (0, 1)


def test_acquire_where_all_slots_are_pinned_waits(house: House) -> None:
    a, b, c = (house.sessions.create(name, TTTParams()) for name in "abc")
    assert house.sessions.acquire(a)
    assert house.sessions.acquire(b)
    assert not house.sessions.acquire(c)
    assert (c.pins, c.slot) == (0, BASE_SLOT)
    assert house.sessions.evictions == 0
    house.sessions.release(a)
    assert house.sessions.acquire(c)
    assert (a.slot, house.sessions.evictions) == (BASE_SLOT, 1)


def test_eviction_takes_the_session_that_was_used_longest_ago(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    a, b, c = (house.sessions.create(name, TTTParams()) for name in "abc")
    house.teach(a)
    house.teach(b)
    house.teach(a)
    house.teach(c)
    assert (a.slot != BASE_SLOT, b.slot != BASE_SLOT, c.slot != BASE_SLOT) == (True, False, True)


def test_eviction_and_return_keep_the_state_bit_by_bit(house: House) -> None:
    session = house.sessions.create("repo", TTTParams())
    state, digest = house.teach(session), house.sessions.digest(session)
    for name in "ab":
        house.teach(house.sessions.create(name, TTTParams()))
    assert session.slot == BASE_SLOT
    assert session.state is not None
    assert house.sessions.digest(session) == digest
    assert house.sessions.acquire(session)
    assert session.state is None
    assert same(house.sessions.state(session), state)
    assert house.bank.version(session.slot) == session.version == 1
    assert house.sessions.digest(session) == digest


def test_state_of_a_session_is_a_copy_wherever_it_is(house: House) -> None:
    session = house.sessions.create("repo", TTTParams())
    state = house.teach(session)
    for _ in range(2):
        house.sessions.state(session).weights.zero_()
        assert same(house.sessions.state(session), state)
        for name in "ab":
            if name not in house.sessions.names():
                house.sessions.create(name, TTTParams())
            house.teach(house.sessions.get(name))


def test_weights_for_one_request_are_wiped_with_the_last_pin(house: House) -> None:
    session = house.sessions.create_ephemeral("42")
    assert session.owner not in house.sessions.names()
    assert house.sessions.acquire(session)
    slot = session.slot
    house.sessions.release(session)
    assert house.bank.occupied == 0
    assert session.slot == BASE_SLOT
    # The next owner of the slot begins with nothing of the last.
    other = house.sessions.create("other", TTTParams())
    assert house.sessions.acquire(other)
    assert other.slot == slot
    assert torch.equal(house.sessions.state(other).weights, house.bank.fresh_weights)


# --- deleting and forking -------------------------------------------------------------------------


def test_delete_forgets_the_weights_and_frees_the_slot(house: House) -> None:
    session = house.sessions.create("repo", TTTParams())
    house.teach(session)
    house.sessions.delete("repo")
    assert house.bank.occupied == 0
    with pytest.raises(NotFoundError):
        house.sessions.get("repo")
    again = house.sessions.create("repo", TTTParams())
    assert house.sessions.norm(again) == 0.0


def test_delete_while_in_use_is_a_conflict_and_changes_nothing(house: House) -> None:
    session = house.sessions.create("repo", TTTParams())
    state = house.teach(session)
    assert house.sessions.acquire(session)
    with pytest.raises(ConflictError, match="in use by 1 request"):
        house.sessions.delete("repo")
    assert same(house.sessions.state(house.sessions.get("repo")), state)


def test_delete_of_an_unknown_session_is_not_found(house: House) -> None:
    with pytest.raises(NotFoundError):
        house.sessions.delete("repo")


@pytest.mark.parametrize("evicted", [False, True])
def test_fork_copies_everything_and_goes_its_own_way(house: House, evicted: bool) -> None:
    parent = house.sessions.create("repo", TTTParams(budget=2.0))
    state = house.teach(parent)
    parent.remember("chunk", 64)
    parent.record(2.0, 3.0)
    parent.threshold.offset = 0.5
    parent.ledger.charge(Action.UPDATE_1, {"nominal": NOMINAL, "measured": NOMINAL}, 0.1)
    if evicted:
        for name in "ab":
            house.teach(house.sessions.create(name, TTTParams()))
    child = house.sessions.fork("repo", "twin")
    assert same(house.sessions.state(child), state)
    assert child.version == parent.version
    assert child.ledger == parent.ledger
    assert child.threshold == parent.threshold
    assert (child.loss_ema, child.chunks) == (parent.loss_ema, parent.chunks)
    assert child.has_learned("chunk")
    assert child.defaults == parent.defaults
    assert child.pins == 0
    house.teach(child)
    child.remember("other", 64)
    child.record(9.0, 1.0)
    child.threshold.offset = -1.0
    child.ledger.charge(Action.SKIP, {"nominal": NOMINAL, "measured": NOMINAL}, 0.1)
    assert same(house.sessions.state(parent), state)
    assert (parent.version, child.version) == (1, 2)
    assert not parent.has_learned("other")
    assert (parent.loss_ema, parent.threshold.offset) == (2.0, 0.5)
    assert parent.ledger.accounts["nominal"].chunks == 1


def test_fork_of_a_session_in_use_is_not_pinned_by_its_request(house: House) -> None:
    parent = house.sessions.create("repo", TTTParams())
    house.teach(parent)
    assert house.sessions.acquire(parent)
    child = house.sessions.fork("repo", None)
    assert child.owner != "repo"
    assert child.pins == 0
    house.sessions.delete(child.owner)
    assert parent.pins == 1


def test_fork_of_an_unknown_or_onto_a_taken_name_is_refused(house: House) -> None:
    house.sessions.create("repo", TTTParams())
    with pytest.raises(NotFoundError):
        house.sessions.fork("nobody", "twin")
    with pytest.raises(ConflictError):
        house.sessions.fork("repo", "repo")
    with pytest.raises(InvalidRequestError):
        house.sessions.fork("repo", "../x")


# --- any order of events --------------------------------------------------------------------------

EVENTS = st.tuples(
    st.sampled_from(["create", "teach", "acquire", "release", "fork", "delete", "one-off"]),
    st.integers(0, 4),
    st.integers(0, 4),
)


@settings(max_examples=120)
@given(events=st.lists(EVENTS, min_size=10, max_size=60))
def test_sessions_through_any_order_of_events_keep_their_own_weights(
    tiny_llama_dir: Path, events: list[tuple[str, int, int]]
) -> None:
    house = make_house(tiny_llama_dir, slots=2, limit=4)
    expected: dict[str, tuple[Tensor, int]] = {}
    pinned: list[Session] = []
    for number, (event, one, two) in enumerate(events):
        name, other = f"s{one}", f"s{two}"
        if event == "create" and name not in expected and len(expected) < 4:
            house.sessions.create(name, TTTParams())
            expected[name] = (house.bank.fresh_weights, 0)
        elif event == "fork" and name in expected and other not in expected and len(expected) < 4:
            house.sessions.fork(name, other)
            expected[other] = expected[name]
        elif event == "delete" and name in expected:
            if house.sessions.get(name).pins == 0:
                house.sessions.delete(name)
                del expected[name]
        elif event == "acquire" and name in expected:
            session = house.sessions.get(name)
            if house.sessions.acquire(session):
                pinned.append(session)
            else:
                assert len({s.owner for s in pinned}) == 2
        elif event == "release" and pinned:
            house.sessions.release(pinned.pop(one % len(pinned)))
        elif event == "teach" and name in expected:
            session = house.sessions.get(name)
            if session.slot != BASE_SLOT or len({s.owner for s in pinned}) < 2:
                expected[name] = (house.teach(session).weights, expected[name][1] + 1)
        elif event == "one-off" and len({s.owner for s in pinned}) < 2:
            house.teach(house.sessions.create_ephemeral(str(number)))
        assert set(house.sessions.names()) == set(expected)
        for known, (weights, version) in expected.items():
            session = house.sessions.get(known)
            assert torch.equal(house.sessions.state(session).weights, weights)
            assert session.version == version
            assert session.pins == sum(each is session for each in pinned)
    for session in pinned:
        house.sessions.release(session)
    for name in list(expected):
        house.sessions.delete(name)
    assert house.bank.occupied == 0
