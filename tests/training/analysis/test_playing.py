"""Playing recorded episodes: as the environment of training does it, and within the budget."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.ledger import WINDOW
from ponderttt.errors import InvalidRequestError
from tests.training.analysis.recorded import (
    RULES,
    RULES_FREE,
    RULES_MEASURED,
    episode,
    flat,
)
from training.analysis.oracle import Scripted
from training.analysis.playing import Turn, play, worst_window
from training.environments.budgeted import BudgetRules
from training.environments.trace_env import TraceEnv

ACTIONS = st.sampled_from(list(Action))


@dataclass
class Watcher:
    """Wants given actions in turn, and keeps what it was told."""

    wants: list[Action]
    turns: list[Turn] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)

    def choose(self, turn: Turn) -> Action:
        self.turns.append(turn)
        self.features.append(turn.decision.features())
        return self.wants[turn.decided]


def test_a_chooser_is_told_what_the_environment_of_training_tells() -> None:
    made = episode(90, seed=3, learnable=0.7)
    rules = replace(RULES, budgets=(2.0,))
    env = TraceEnv([made], rules, 1)
    seen = env.reset()
    observed, taken, done = [], [], False
    generator = torch.Generator().manual_seed(0)
    while not done:
        observed.append(seen)
        action = int(torch.multinomial(seen.allowed[0].double(), 1, generator=generator))
        taken.append(Action(action))
        result = env.step(torch.tensor([action]))
        seen, done = result.observation, bool(result.done[0])
    watcher = Watcher(taken)
    played = play(made, watcher, rules, 2.0)
    assert len(set(taken)) > 2
    assert len(watcher.turns) == len(observed) == made.learnable.sum()
    for turn, features, expected in zip(watcher.turns, watcher.features, observed, strict=True):
        assert torch.equal(features, expected.features[0])
        mask = [action in turn.decision.allowed for action in Action]
        assert mask == expected.allowed[0].tolist()
    assert [played.actions[turn.position] for turn in watcher.turns] == taken
    assert played.cut == 0


@given(
    st.lists(ACTIONS, min_size=1, max_size=150),
    st.sampled_from([RULES, RULES_MEASURED]),
    st.floats(1.0, 12.0),
)
def test_the_budget_holds_over_the_episode_and_every_window(
    wants: list[Action], rules: BudgetRules, budget: float
) -> None:
    played = play(episode(len(wants), seed=1), Scripted(tuple(wants)), rules, budget)
    assert played.mean_cost[rules.cost_model] <= budget + 1e-9
    assert played.worst_window <= budget + 1e-9
    assert all(taken <= wanted for taken, wanted in zip(played.actions, wants, strict=True))


def test_what_is_wanted_is_done_where_the_budget_is_not_enforced() -> None:
    made = flat(5, (0.0, 1.0, 2.0, 4.0))
    wants = (Action.UPDATE_4, Action.SKIP, Action.UPDATE_2, Action.UPDATE_1, Action.UPDATE_4)
    played = play(made, Scripted(wants), RULES_FREE, 1.0)
    assert played.actions == wants
    assert played.gain == pytest.approx(4 + 2 + 1 + 4)
    assert played.mean_cost == {
        "nominal": pytest.approx((12 + 1 + 5 + 3 + 12) / 5),
        "measured": pytest.approx((7.993 * 2 + 1 + 4.415 + 2.731) / 5),
    }


def test_chunks_that_cannot_be_learned_are_skipped_unasked() -> None:
    made = episode(40, seed=5, learnable=0.5)
    watcher = Watcher([Action.UPDATE_1] * 40)
    played = play(made, watcher, RULES_FREE, 3.0)
    assert [turn.position for turn in watcher.turns] == np.flatnonzero(made.learnable).tolist()
    assert [turn.decided for turn in watcher.turns] == list(range(int(made.learnable.sum())))
    assert [action is not Action.SKIP for action in played.actions] == made.learnable.tolist()


def test_what_the_ledger_took_away_is_counted() -> None:
    played = play(flat(4, (0.0, 1.0, 2.0, 3.0)), Scripted((Action.UPDATE_4,) * 4), RULES, 2.0)
    # 4 to spend above SKIP: UPDATE_2 once, for 4.
    assert played.actions == (Action.UPDATE_2, Action.SKIP, Action.SKIP, Action.SKIP)
    assert played.cut == 4


@given(st.lists(st.floats(1, 12), min_size=1, max_size=200))
def test_the_worst_window_is_the_dearest_stretch(costs: list[float]) -> None:
    width = min(WINDOW, len(costs))
    means = [np.mean(costs[i : i + width]) for i in range(len(costs) - width + 1)]
    assert worst_window(costs) == pytest.approx(max(means))


def test_an_episode_without_a_chunk_or_an_odd_budget_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="has no chunk"):
        play(episode(0), Scripted(()), RULES, 2.0)
    with pytest.raises(InvalidRequestError, match="budget"):
        play(episode(1), Scripted((Action.SKIP,)), RULES, 0.5)
