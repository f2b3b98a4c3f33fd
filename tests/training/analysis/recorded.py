"""Recorded episodes made up from a seed, and rules to play them under."""

from __future__ import annotations

import numpy as np

from ponderttt.adaptation.actions import NOMINAL, Action, CostModel
from ponderttt.adaptation.features import FEATURE_NAMES
from training.analysis.gains import TraceEpisode
from training.environments.budgeted import BudgetRules

# Sums of these are no round numbers.
MEASURED = CostModel(
    "measured",
    {Action.SKIP: 1.0, Action.UPDATE_1: 2.731, Action.UPDATE_2: 4.415, Action.UPDATE_4: 7.993},
    0.1,
)
COSTS = {"nominal": NOMINAL, "measured": MEASURED}
RULES = BudgetRules((1.5, 2.0, 3.0), COSTS)
RULES_MEASURED = BudgetRules((1.5, 2.0, 3.0), COSTS, "measured")
RULES_FREE = BudgetRules((1.5, 2.0, 3.0), COSTS, enforced=False)


def episode(
    chunks: int, seed: int = 0, learnable: float = 0.85, repository: str = "r"
) -> TraceEpisode:
    """Gains differ by chunk, grow with the steps, and are now and then losses."""
    rng = np.random.default_rng(seed)
    gains = rng.gamma(1.0, 20.0, (chunks, 1)) * np.array([0.0, 1.0, 1.5, 2.0])
    gains += rng.normal(0.0, 5.0, (chunks, 4))
    gains[:, Action.SKIP] = 0.0
    return TraceEpisode(
        name=f"{repository}#{seed}",
        repository=repository,
        gains=gains,
        learnable=rng.random(chunks) < learnable,
        losses=rng.gamma(4.0, 0.5, chunks),
        features=rng.normal(size=(chunks, len(FEATURE_NAMES))),
        tokens=rng.integers(32, 257, chunks),
        near=np.arange(chunks)[::-1] % 4,
    )


def flat(chunks: int, gains: tuple[float, float, float, float]) -> TraceEpisode:
    """The same gains everywhere, all of it learnable."""
    made = episode(chunks, learnable=1.1)
    return TraceEpisode(
        made.name,
        made.repository,
        np.tile(np.array(gains), (chunks, 1)),
        made.learnable,
        made.losses,
        made.features,
        made.tokens,
        made.near,
    )
