"""History features against numbers worked by hand."""

from __future__ import annotations

import math

import pytest

from ponderttt.adaptation.observation import History
from tests.ponderttt.adaptation.features.observations import feature, make_observation


def of(history: History, name: str) -> float:
    return feature(make_observation(history=history), name)


def test_loss_ema_is_on_the_scale_of_the_mean_loss() -> None:
    obs = make_observation(losses=[1.5] * 4, history=History(loss_ema=1.5, chunks=3))
    assert feature(obs, "loss_ema") == pytest.approx(math.log(2.5))
    assert feature(obs, "loss_ema") == feature(obs, "mean_loss")


@pytest.mark.parametrize(("cost", "expected"), [(1.0, 0.0), (12.0, 1.0), (math.sqrt(12), 0.5)])
def test_cost_ema_runs_from_skip_to_update_4(cost: float, expected: float) -> None:
    assert of(History(cost_ema=cost, chunks=1), "cost_ema") == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("budget", "credit", "expected"),
    [
        (4.0, 0.0, 4 / 16),
        (4.0, 8.0, 12 / 24),
        (2.0, -1.0, 1 / 13),
        (2.0, -5.0, 0.0),
        (12.0, 11_976.0, 11_988 / 12_000),
    ],
)
def test_allowance_is_what_the_chunk_may_cost(
    budget: float, credit: float, expected: float
) -> None:
    history = History(budget=budget, credit=credit, chunks=9)
    assert of(history, "allowance") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("budget", "credit", "chunks", "expected"),
    [
        (3.0, 6.0, 4, 6 / 12),
        (3.0, 0.0, 0, 0.0),
        (12.0, 11.0, 1, 11 / 12),
        (2.0, -3.0, 6, -3 / 12),
        (1.0, -110.0, 10, -1.0),
    ],
)
def test_unspent_is_the_share_left_of_all_budget(
    budget: float, credit: float, chunks: int, expected: float
) -> None:
    history = History(budget=budget, credit=credit, chunks=chunks)
    assert of(history, "unspent") == pytest.approx(expected)
