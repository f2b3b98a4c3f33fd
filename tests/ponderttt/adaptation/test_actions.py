"""The four actions and their nominal costs."""

from __future__ import annotations

import pytest

from ponderttt.adaptation.actions import NOMINAL, NOMINAL_COSTS, Action, CostModel


@pytest.mark.parametrize(
    ("name", "steps", "cost"),
    [("SKIP", 0, 1.0), ("UPDATE_1", 1, 3.0), ("UPDATE_2", 2, 5.0), ("UPDATE_4", 4, 12.0)],
)
def test_action_as_published_has_these_steps_and_cost(name: str, steps: int, cost: float) -> None:
    assert Action[name].steps == steps
    assert NOMINAL_COSTS[Action[name]] == cost
    assert NOMINAL[Action[name]] == cost


def test_actions_in_order_of_strength_are_the_outputs_of_a_policy() -> None:
    assert [action.value for action in Action] == [0, 1, 2, 3]
    assert [action.steps for action in Action] == sorted(action.steps for action in Action)


def test_cost_model_with_figures_of_its_own_gives_them() -> None:
    costs = {action: 1.0 + action.steps for action in Action}
    model = CostModel("measured", costs, chunk_seconds=0.25)
    assert [model[action] for action in Action] == [1.0, 2.0, 3.0, 5.0]
    assert model.chunk_seconds == 0.25
    assert NOMINAL.chunk_seconds == 0.0
