"""Choosers: when they learn, what they spend, and which of them is found best."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ponderttt.adaptation.actions import NOMINAL, Action
from ponderttt.adaptation.features import FEATURE_NAMES
from ponderttt.adaptation.gates import Decision, ThresholdGate, ThresholdState, within_budget
from ponderttt.adaptation.ledger import Ledger
from ponderttt.adaptation.policy import PolicyGate, PolicyMetadata, PolicyNetwork
from ponderttt.errors import InvalidRequestError
from tests.training.analysis.recorded import (
    COSTS,
    RULES,
    RULES_FREE,
    RULES_MEASURED,
    episode,
    flat,
)
from training.analysis.playing import play
from training.analysis.schedules import (
    THRESHOLD,
    UPDATES,
    Fixed,
    FromPolicy,
    FrontLoaded,
    PerBudget,
    Periodic,
    Random,
    Served,
    best_fixed,
    tilted,
)
from training.environments.budgeted import BudgetRules

S, U1, U2, U4 = Action


def test_fixed_falls_back_to_what_the_budget_pays_for_and_front_loaded_does_not() -> None:
    made = flat(12, (0.0, 1.0, 1.0, 1.0))
    # 18 to spend above SKIP: UPDATE_4 for 11, then UPDATE_2 for 4 and UPDATE_1 for 2.
    assert play(made, Fixed(U4), RULES, 2.5).actions[:4] == (U4, U2, U1, S)
    assert play(made, FrontLoaded(U4), RULES, 2.5).actions == (U4, *[S] * 11)
    assert play(made, FrontLoaded(U1), RULES, 2.5).actions == (*[U1] * 9, *[S] * 3)


def test_periodic_counts_chunks_that_can_be_learned() -> None:
    made = episode(40, seed=1, learnable=0.6)
    played = play(made, Periodic(U2, 3, 1), RULES_FREE, 12.0)
    able = np.flatnonzero(made.learnable)
    assert np.flatnonzero(played.actions).tolist() == able[1::3].tolist()


@pytest.mark.parametrize(("every", "offset"), [(0, 0), (2, 2), (2, -1)])
def test_a_period_that_is_none_is_refused(every: int, offset: int) -> None:
    with pytest.raises(InvalidRequestError, match=r"every|offset"):
        Periodic(U1, every, offset)


@pytest.mark.parametrize("actions", [(U1,), UPDATES])
@pytest.mark.parametrize("budget", [1.5, 2.0, 2.5])
def test_random_meets_the_budget_although_some_chunks_cannot_be_learned(
    actions: tuple[Action, ...], budget: float
) -> None:
    made = [episode(300, seed) for seed in range(3)]
    played = [play(e, Random(actions), RULES_FREE, budget) for e in made]
    assert np.mean([run.mean_cost["nominal"] for run in played]) == pytest.approx(budget, rel=0.01)
    # Not all at the beginning, as a schedule would.
    late = Counter(action for run in played for action in run.actions[150:])
    early = Counter(action for run in played for action in run.actions[:150])
    assert 0.6 < (450 - late[S]) / (450 - early[S]) < 1.7
    assert {*late} == {S, *actions}


@pytest.mark.parametrize("actions", [(U1,), UPDATES])
@pytest.mark.parametrize("rules", [RULES, RULES_MEASURED])
@pytest.mark.parametrize("budget", [1.5, 2.0, 2.5])
def test_random_still_spends_nearly_the_budget_under_the_ledger(
    actions: tuple[Action, ...], rules: BudgetRules, budget: float
) -> None:
    played = [play(episode(60, seed), Random(actions), rules, budget) for seed in range(20)]
    mean = np.mean([run.mean_cost[rules.cost_model] for run in played])
    assert 0.96 * budget < mean <= budget


def test_random_draws_differ_by_seed_and_episode_alone() -> None:
    one, other = flat(60, (0.0, 1.0, 1.0, 1.0)), flat(60, (0.0, 1.0, 1.0, 1.0))
    other = replace(other, name="another")
    first = play(one, Random(), RULES, 2.0, seed=1).actions
    assert play(one, Random(), RULES, 2.0, seed=1).actions == first
    assert play(one, Random(), RULES, 2.0, seed=2).actions != first
    assert play(other, Random(), RULES, 2.0, seed=1).actions != first


@given(st.floats(0.0, 13.0), st.sampled_from([(U1,), (U1, U2), UPDATES]))
def test_tilted_has_the_mean_asked_for(mean: float, actions: tuple[Action, ...]) -> None:
    costs = np.array([NOMINAL[action] for action in (S, *actions)])
    shares = tilted(costs, mean)
    assert shares.sum() == pytest.approx(1)
    assert (shares >= 0).all()
    assert shares @ costs == pytest.approx(np.clip(mean, costs.min(), costs.max()), abs=1e-6)


@given(st.floats(1.2, 11.0), st.lists(st.floats(-1, 1), min_size=4, max_size=4))
def test_no_distribution_of_that_mean_has_more_entropy_than_tilted(
    mean: float, direction: list[float]
) -> None:
    costs = np.array([NOMINAL[action] for action in Action])
    shares = tilted(costs, mean)
    # Along any direction that changes neither the sum nor the mean.
    fixed = np.linalg.qr(np.stack([np.ones(4), costs], 1))[0]
    step = np.array(direction) - fixed @ (fixed.T @ np.array(direction))
    other = shares + step * 0.5 * shares.min() / max(np.abs(step).max(), 1e-3)

    def entropy(p: NDArray[np.float64]) -> float:
        return float(-(p * np.log(p)).sum())

    assert entropy(other) <= entropy(shares) + 1e-9


def test_threshold_decides_as_the_served_gate_does() -> None:
    made, budget = episode(120, seed=6, learnable=1.1), 1.8
    state, ledger, expected = ThresholdState(), Ledger(), []
    for position, loss in enumerate(made.losses):
        allowed = ledger.allowed(NOMINAL, budget, len(made.losses) - position - 1)
        decision = Decision(
            float(loss), lambda: torch.zeros(32), allowed, budget, NOMINAL, state, "key"
        )
        action = within_budget(ThresholdGate().choose(decision), allowed)
        ledger.charge(action, COSTS, 0.0)
        expected.append(action)
    assert play(made, THRESHOLD, RULES, budget).actions == tuple(expected)
    assert set(expected) == {S, U1}


@pytest.fixture
def policy() -> PolicyGate:
    torch.manual_seed(0)
    network = PolicyNetwork((8,))
    width = len(FEATURE_NAMES)
    metadata = PolicyMetadata("m", 256, "nominal", (2.0,), (0.1,) * width, (0.5,) * width, (8,))
    return PolicyGate(network, metadata)


def test_a_greedy_policy_decides_as_the_served_gate_does(policy: PolicyGate) -> None:
    made = episode(100, seed=7)
    greedy = play(made, FromPolicy(policy.logits), RULES, 2.0)
    assert greedy == play(made, Served(policy), RULES, 2.0)
    assert len(set(greedy.actions)) > 2


def test_a_sampled_policy_draws_in_proportion_among_what_is_allowed() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.5, 2.0]])
    chooser = FromPolicy(lambda features: logits, sampled=True)
    made = flat(2000, (0.0, 1.0, 1.0, 1.0))
    counts = Counter(play(made, chooser, RULES_FREE, 12.0).actions)
    shares = torch.softmax(logits[0], 0).tolist()
    assert [counts[action] / 2000 for action in Action] == pytest.approx(shares, abs=0.035)
    # UPDATE_4 wins greedily, but two chunks at a budget of 2 don't pay for it.
    assert U4 not in play(flat(2, (0.0, 1.0, 1.0, 1.0)), chooser, RULES, 2.0).actions


def test_per_budget_asks_the_chooser_of_that_budget() -> None:
    chooser = PerBudget({1.5: Fixed(S), 2.0: Fixed(U1)})
    made = flat(10, (0.0, 1.0, 1.0, 1.0))
    assert set(play(made, chooser, RULES, 1.5).actions) == {S}
    assert play(made, chooser, RULES, 2.0) == play(made, Fixed(U1), RULES, 2.0)
    with pytest.raises(InvalidRequestError, match=r"3 is not one of 1\.5, 2"):
        play(made, chooser, RULES, 3.0)


def test_the_best_schedule_is_the_one_that_was_planted() -> None:
    plain = flat(40, (0.0, 0.1, 0.1, 0.1))
    gains = plain.gains.copy()
    gains[2::4, U2] = 5.0
    made = replace(plain, gains=gains)
    assert best_fixed([made], RULES, 2.0) == Periodic(U2, 4, 2)
    early = replace(plain, gains=np.where(np.arange(40)[:, None] < 6, gains * 0 + [0, 1, 1, 9], 0))
    assert best_fixed([early], RULES, 3.0, [Fixed(U1), FrontLoaded(U4)]) == FrontLoaded(U4)


def test_the_best_schedule_counts_every_repository_alike() -> None:
    long = replace(flat(64, (0.0, 0.0, 1.0, 0.0)), repository="long")
    short = replace(flat(8, (0.0, 1.0, 0.0, 0.0)), repository="short")
    candidates = [FrontLoaded(U2), FrontLoaded(U1)]
    assert best_fixed([long, short], RULES, 3.0, candidates) == FrontLoaded(U1)
    assert best_fixed([long], RULES, 3.0, candidates) == FrontLoaded(U2)


def test_no_episode_or_no_candidate_has_no_best() -> None:
    with pytest.raises(InvalidRequestError, match="episodes"):
        best_fixed([], RULES, 2.0)
    with pytest.raises(InvalidRequestError, match="candidates"):
        best_fixed([episode(3)], RULES, 2.0, [])
