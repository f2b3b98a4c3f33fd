"""The ledger: a budget holds over every request and every 64 chunks, whatever the gate wants."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ponderttt.adaptation.actions import NOMINAL, Action, CostModel
from ponderttt.adaptation.gates import within_budget
from ponderttt.adaptation.ledger import WINDOW, Account, Ledger

CHEAP = CostModel(
    "measured",
    {Action.SKIP: 1.0, Action.UPDATE_1: 1.9, Action.UPDATE_2: 2.7, Action.UPDATE_4: 4.4},
)
MODELS = {"nominal": NOMINAL, "measured": CHEAP}
# Sums of floats: far below the smallest difference between two actions.
ROUNDING = 1e-6

BUDGETS = st.one_of(
    st.floats(1.0, 12.0), st.sampled_from([1.0, 1.5, 2.0, 3.0, 5.0, 12.0, 1.9, 2.7, 4.4])
)
ACTIONS = st.sampled_from(list(Action))


def _wishes(length: int, favourites: list[Action], seed: int) -> list[Action]:
    return random.Random(seed).choices(favourites, k=length)


# Long enough for several windows, which lists drawn element by element seldom are.
REQUEST = st.builds(
    _wishes, st.integers(1, 150), st.lists(ACTIONS, min_size=1, max_size=4), st.integers(0, 2**32)
)


@dataclass
class Spent:
    """What a run of requests cost, chunk by chunk, in one cost model."""

    costs: list[float]
    ends: list[int]


def spend(
    ledger: Ledger, model: CostModel, budget: float, requests: list[list[Action]], early: bool
) -> Spent:
    """Run requests whose gate wants these actions; `early` counts on the chunks still to come."""
    spent = Spent([], [])
    for wishes in requests:
        for place, wanted in enumerate(wishes):
            ahead = len(wishes) - place - 1 if early else 0
            allowed = ledger.allowed(model, budget, ahead)
            assert Action.SKIP in allowed
            action = within_budget(wanted, allowed)
            assert action <= wanted
            ledger.charge(action, MODELS, 0.5)
            spent.costs.append(model[action])
        spent.ends.append(len(spent.costs))
    return spent


@settings(max_examples=150, deadline=None)
@given(
    st.lists(REQUEST, min_size=1, max_size=6), BUDGETS, st.sampled_from([NOMINAL, CHEAP]),
    st.booleans(),
)  # fmt: skip
def test_budget_whatever_the_gate_wants_holds_at_each_end_and_in_each_window(
    requests: list[list[Action]], budget: float, model: CostModel, early: bool
) -> None:
    spent = spend(Ledger(), model, budget, requests, early)
    for end in spent.ends:
        assert sum(spent.costs[:end]) <= budget * end + ROUNDING
    for start in range(len(spent.costs) - WINDOW + 1):
        assert sum(spent.costs[start : start + WINDOW]) <= budget * WINDOW + ROUNDING


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(REQUEST, BUDGETS, st.booleans()), min_size=1, max_size=6))
def test_budget_that_differs_between_requests_binds_every_request_that_learns(
    requests: list[tuple[list[Action], float, bool]],
) -> None:
    ledger = Ledger()
    costs: list[float] = []
    for wishes, budget, early in requests:
        before = len(costs)
        costs += spend(ledger, NOMINAL, budget, [wishes], early).costs
        learned = [place for place in range(before, len(costs)) if costs[place] > 1.0]
        # A budget below what was spent before can't be kept, but it stops all learning.
        if learned:
            assert sum(costs) <= budget * len(costs) + ROUNDING
        for place in learned:
            window = costs[max(0, place - WINDOW + 1) : place + 1]
            assert sum(window) + (WINDOW - len(window)) <= budget * WINDOW + ROUNDING


@given(
    st.lists(ACTIONS, max_size=150), BUDGETS, st.sampled_from([NOMINAL, CHEAP]),
    st.integers(0, 200),
)  # fmt: skip
def test_skip_after_any_spending_is_always_allowed(
    history: list[Action], budget: float, model: CostModel, ahead: int
) -> None:
    ledger = Ledger()
    for action in history:
        ledger.charge(action, MODELS, 0.0)
    allowed = ledger.allowed(model, budget, ahead)
    assert Action.SKIP in allowed
    # Nothing weaker than an allowed action is refused.
    assert allowed == {action for action in Action if action <= max(allowed)}


@pytest.mark.parametrize("model", [NOMINAL, CHEAP])
@pytest.mark.parametrize("action", list(Action))
def test_budget_of_exactly_an_actions_cost_always_allows_it(
    model: CostModel, action: Action
) -> None:
    ledger = Ledger()
    for _ in range(1000):
        assert action in ledger.allowed(model, model[action])
        ledger.charge(action, MODELS, 0.0)
    assert ledger.accounts[model.name].mean == pytest.approx(model[action])


def test_budget_just_below_an_actions_cost_refuses_it_at_first() -> None:
    assert Action.UPDATE_1 not in Ledger().allowed(NOMINAL, 2.999)
    assert Ledger().allowed(NOMINAL, 1.0) == {Action.SKIP}


def test_budget_of_none_allows_everything_and_owes_nothing() -> None:
    ledger = Ledger()
    for _ in range(100):
        ledger.charge(Action.UPDATE_4, MODELS, 0.0)
    assert ledger.allowed(NOMINAL, None) == set(Action)
    assert ledger.credit(NOMINAL, None) == 0.0


def test_chunks_ahead_let_learning_come_early_and_are_then_skipped() -> None:
    # Budget 2 over 10 chunks pays for 5 of UPDATE_1: the first five, if asked for at once.
    spent = spend(Ledger(), NOMINAL, 2.0, [[Action.UPDATE_1] * 10], early=True)
    assert spent.costs == [3.0] * 5 + [1.0] * 5
    late = spend(Ledger(), NOMINAL, 2.0, [[Action.UPDATE_1] * 10], early=False)
    assert late.costs == [1.0, 3.0] * 5


def test_window_within_a_long_request_stops_what_the_mean_would_allow() -> None:
    # 200 chunks at budget 2 would pay for 100 updates at once; 64 in a row pay for 32.
    spent = spend(Ledger(), NOMINAL, 2.0, [[Action.UPDATE_1] * 200], early=True)
    assert spent.costs[:64] == [3.0] * 32 + [1.0] * 32
    assert sum(spent.costs) == 400.0


def test_credit_after_skips_is_what_was_not_spent() -> None:
    ledger = Ledger()
    for action in (Action.SKIP, Action.SKIP, Action.UPDATE_1):
        ledger.charge(action, MODELS, 0.25)
    assert ledger.credit(NOMINAL, 2.0) == pytest.approx(3 * 2.0 - 5.0)
    assert ledger.credit(CHEAP, 2.0) == pytest.approx(3 * 2.0 - 3.9)
    assert ledger.credit(NOMINAL, 1.5) == pytest.approx(3 * 1.5 - 5.0)


def test_charge_enters_both_cost_models_the_action_and_the_seconds() -> None:
    ledger = Ledger()
    ledger.charge(Action.UPDATE_2, MODELS, 0.25)
    ledger.charge(Action.SKIP, MODELS, 0.5)
    assert ledger.accounts["nominal"].total == 6.0
    assert ledger.accounts["measured"].total == pytest.approx(3.7)
    assert ledger.accounts["nominal"].mean == 3.0
    assert ledger.seconds == 0.75
    assert ledger.chunks_by_action == {"SKIP": 1, "UPDATE_1": 0, "UPDATE_2": 1, "UPDATE_4": 0}


def test_chunks_without_a_budget_neither_earn_nor_owe() -> None:
    ledger = Ledger()
    for action in (Action.UPDATE_4, Action.SKIP, Action.SKIP):
        ledger.charge(action, MODELS, 0.5, budgeted=False)
    assert ledger.credit(NOMINAL, 2.0) == 0.0
    assert ledger.allowed(NOMINAL, 3.0) == {Action.SKIP, Action.UPDATE_1}
    assert ledger.accounts["nominal"].mean == 0.0
    # They are counted all the same.
    assert (ledger.chunks, ledger.seconds) == (3, 1.5)
    assert ledger.mean("nominal") == pytest.approx(14.0 / 3)
    assert ledger.mean("measured") == pytest.approx(6.4 / 3)
    assert ledger.chunks_by_action["UPDATE_4"] == 1


def test_ledger_before_its_first_chunk_has_means_of_zero() -> None:
    assert (Ledger().mean("nominal"), Ledger().mean("measured")) == (0.0, 0.0)


def test_account_before_its_first_chunk_has_a_mean_of_zero() -> None:
    assert Account().mean == 0.0


def test_account_after_many_chunks_remembers_no_more_than_a_window() -> None:
    account = Account()
    for _ in range(1000):
        account.charge(3.0)
    assert len(account.recent) == WINDOW - 1
    assert (account.chunks, account.total) == (1000, 3000.0)
