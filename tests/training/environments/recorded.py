"""Recorded episodes of made-up numbers."""

from __future__ import annotations

import numpy as np

from ponderttt.adaptation.actions import NOMINAL, CostModel, CostModelName
from training.analysis.gains import TraceEpisode
from training.environments.budgeted import BudgetRules

MEASURED = CostModel("measured", dict(zip(NOMINAL.costs, (1.0, 2.4, 3.3, 4.8), strict=True)))
COSTS = {"nominal": NOMINAL, "measured": MEASURED}


def rules(
    *budgets: float, enforced: bool = True, cost_model: CostModelName = "nominal"
) -> BudgetRules:
    return BudgetRules(budgets or (2.0,), COSTS, cost_model, enforced=enforced)


def recorded(number: int, chunks: int, unlearnable: tuple[int, ...] = ()) -> TraceEpisode:
    """An episode of `chunks` chunks; those in `unlearnable` are too short."""
    draw = np.random.default_rng(number)
    gains = draw.normal(5.0, 10.0, (chunks, 4))
    gains[:, 0] = 0.0
    learnable = np.ones(chunks, dtype=bool)
    learnable[list(unlearnable)] = False
    gains[~learnable] = 0.0
    return TraceEpisode(
        name=f"r{number}#0",
        repository=f"r{number}",
        gains=gains,
        learnable=learnable,
        losses=draw.uniform(0.5, 3.0, chunks),
        features=draw.normal(size=(chunks, 32)),
        tokens=np.full(chunks, 256),
        near=np.arange(chunks)[::-1] % 3,
    )
