"""History features against numbers worked by hand."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ponderttt.adaptation.features.history import LEAST_COST
from ponderttt.adaptation.observation import History
from tests.ponderttt.adaptation.features.observations import feature, make_observation


def of(history: History, name: str) -> float:
    return feature(make_observation(history=history), name)


def test_loss_ema_is_on_the_scale_of_the_mean_loss() -> None:
    obs = make_observation(losses=[1.5] * 4, history=History(loss_ema=1.5))
    assert feature(obs, "loss_ema") == pytest.approx(math.log(2.5))
    assert feature(obs, "loss_ema") == feature(obs, "mean_loss")


@pytest.mark.parametrize(("cost", "expected"), [(1.0, 0.0), (12.0, 1.0), (math.sqrt(12), 0.5)])
def test_cost_ema_runs_from_skip_to_update_4(cost: float, expected: float) -> None:
    assert of(History(cost_ema=cost), "cost_ema") == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("budget", "credit", "ahead", "rate"),
    [
        (4.0, 0.0, 0, 4.0),
        (4.0, 0.0, 30, 4.0),
        (4.0, 8.0, 0, 12.0),
        (2.0, -10.0, 19, 1.5),
        (2.0, -1.0, 0, 1.0),
        (2.0, -5.0, 0, LEAST_COST),
        (12.0, 11_976.0, 0, 11_988.0),
    ],
)
def test_allowance_is_the_mean_cost_that_uses_the_budget_up(
    budget: float, credit: float, ahead: int, rate: float
) -> None:
    history = History(budget=budget, credit=credit, ahead=ahead)
    assert of(history, "allowance") == pytest.approx(math.log(rate) / math.log(12), abs=1e-7)


@given(st.floats(1.0, 12.0), st.integers(1, 60), st.data())
def test_spending_the_allowance_to_the_end_costs_the_budget(
    budget: float, chunks: int, data: st.DataObject
) -> None:
    """From any point of a request: the rest at the allowance brings the mean to the budget."""
    done = data.draw(st.integers(0, chunks - 1))
    # Nobody can have spent more than leaves the cost of skipping the rest.
    most = budget * chunks - (chunks - done)
    total = data.draw(st.floats(done, max(most, done)))
    left = chunks - done
    history = History(budget=budget, credit=budget * done - total, ahead=left - 1)
    rate = math.exp(of(history, "allowance") * math.log(12))
    assert (total + left * rate) / chunks == pytest.approx(budget, rel=1e-4)


@pytest.mark.parametrize(("ahead", "expected"), [(0, 0.0), (16, 0.5), (48, 0.75)])
def test_remaining_rises_with_the_text_that_follows(ahead: int, expected: float) -> None:
    assert of(History(ahead=ahead), "remaining") == pytest.approx(expected)
