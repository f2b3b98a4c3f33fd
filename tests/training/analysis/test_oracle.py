"""The oracle against brute force, and as a bound for everything else."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ponderttt.adaptation import ledger
from ponderttt.adaptation.actions import Action
from tests.training.analysis.recorded import RULES, RULES_FREE, RULES_MEASURED, episode, flat
from training.analysis import oracle as solver
from training.analysis import playing
from training.analysis.gains import TraceEpisode
from training.analysis.oracle import MIP_GAP, Scripted, oracle
from training.analysis.playing import Chooser, play
from training.analysis.schedules import THRESHOLD, UPDATES, Fixed, FrontLoaded, Periodic, Random
from training.environments.budgeted import BudgetRules


def brute_force(made: TraceEpisode, rules: BudgetRules, budget: float, window: int) -> float:
    """The best of all 4^T sequences, by the rule as it is written rather than by the ledger."""
    length = len(made.gains)
    choices = [list(Action) if able else [Action.SKIP] for able in made.learnable]
    best = -np.inf
    for actions in product(*choices):
        costs = np.array([rules.cost(action) for action in actions])
        windows = [costs[i : i + window] for i in range(max(length - window + 1, 0))]
        if all(part.mean() <= budget + 1e-9 for part in (costs, *windows)):
            best = max(best, float(made.gains[np.arange(length), actions].sum()))
    return best


@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.sampled_from([RULES, RULES_MEASURED]),
    st.sampled_from([1.0, 1.3, 1.5, 2.0, 3.0, 5.0, 12.0]),
)
@settings(max_examples=40)
def test_the_oracle_finds_what_brute_force_finds(
    seed: int, chunks: int, rules: BudgetRules, budget: float
) -> None:
    made = episode(chunks, seed)
    assert oracle(made, rules, budget).played.gain == pytest.approx(
        brute_force(made, rules, budget, 64), rel=MIP_GAP, abs=1e-9
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rules", [RULES, RULES_MEASURED])
def test_windows_are_kept_as_by_brute_force_and_by_the_ledger(
    seed: int, rules: BudgetRules, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (ledger, playing, solver):
        monkeypatch.setattr(module, "WINDOW", 3)
    made = episode(6, seed, learnable=1.1)
    budget = 3.0
    found = oracle(made, rules, budget).played
    limited = brute_force(made, rules, budget, 3)
    assert found.gain == pytest.approx(limited, rel=MIP_GAP)
    assert found.worst_window <= budget + 1e-9
    assert limited <= brute_force(made, rules, budget, 6)


def test_sixty_four_chunks_in_a_row_pay_for_themselves() -> None:
    gains = np.zeros((140, 4))
    gains[:70, Action.UPDATE_1] = 1.0
    plain = flat(140, (0.0, 0.0, 0.0, 0.0))
    made = TraceEpisode(
        "e", "r", gains, plain.learnable, plain.losses, plain.features, plain.tokens, plain.near
    )
    # The mean alone would pay for all 70; of 64 in a row it is 32, and 6 lie beyond the first 64.
    found = oracle(made, RULES, 2.0)
    assert found.played.gain == pytest.approx(38)
    assert found.bound == pytest.approx(38, rel=MIP_GAP)


CHOOSERS: list[Chooser] = [
    *(kind(action) for kind in (Fixed, FrontLoaded) for action in UPDATES),
    Periodic(Action.UPDATE_2, 3, 1),
    Random(),
    Random(UPDATES),
    THRESHOLD,
]


@given(
    st.integers(0, 10_000),
    st.integers(1, 100),
    st.sampled_from([RULES, RULES_MEASURED]),
    st.sampled_from([1.0, 1.5, 2.0, 3.0, 6.0]),
    st.data(),
)
@settings(max_examples=40)
def test_nobody_gains_more_than_the_oracle(
    seed: int, chunks: int, rules: BudgetRules, budget: float, data: st.DataObject
) -> None:
    made = episode(chunks, seed)
    wants = data.draw(
        st.lists(st.sampled_from(list(Action)), min_size=chunks, max_size=chunks), label="wants"
    )
    best = oracle(made, rules, budget)
    assert best.played.gain >= best.bound * (1 - MIP_GAP) - 1e-9
    for chooser in (*CHOOSERS, Scripted(tuple(wants))):
        assert play(made, chooser, rules, budget, seed).gain <= best.bound + 1e-6


def test_the_ledger_lets_the_oracle_pass_uncut() -> None:
    made = episode(150, seed=2)
    best = oracle(made, RULES_MEASURED, 2.0).played
    again = play(made, Scripted(best.actions), RULES_MEASURED, 2.0)
    assert again == best
    assert again.cut == 0
    assert set(best.actions) > {Action.SKIP, Action.UPDATE_1}


def test_the_budget_binds_the_oracle_even_where_rules_do_not_enforce_it() -> None:
    made = episode(30, seed=4)
    assert oracle(made, RULES_FREE, 1.5).played == oracle(made, RULES, 1.5).played


def test_nothing_is_learned_where_nothing_is_gained() -> None:
    found = oracle(flat(10, (0.0, -1.0, -2.0, 0.0)), RULES, 12.0)
    assert set(found.played.actions) == {Action.SKIP}
    assert (found.played.gain, found.bound) == (0.0, 0.0)
