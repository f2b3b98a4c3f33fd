"""What the session went through before this chunk, and what it may still spend.

In `min` and `max` the value comes before the bound, so that a NaN is kept and reported.
"""

from __future__ import annotations

import math

from ponderttt.adaptation.features.group import FeatureGroup
from ponderttt.adaptation.observation import History
from ponderttt.adaptation.params import MAX_BUDGET, MIN_BUDGET

LEAST_COST = 0.1


def loss_ema(history: History) -> float:
    """log(1 + moving average of chunk losses): what is usual here; 0 before the first chunk.

    On the scale of `mean_loss`, so that their difference is the surprise. The surprise itself
    would nearly repeat `mean_loss` wherever the average moves slowly.
    """
    return math.log1p(history.loss_ema)


def cost_ema(history: History) -> float:
    """log(moving average of nominal costs) / log 12: 0 = only SKIP lately, 1 = only UPDATE_4."""
    return math.log(max(history.cost_ema, LEAST_COST)) / math.log(MAX_BUDGET)


def allowance(history: History) -> float:
    """a / (a + 12) with a = max(0, budget + credit), in [0, 1): what this chunk may cost.

    Equal to budget / (budget + 12) at the first chunk. The budget alone would be a constant of
    the session. Saturates where every action is affordable, however long the session.
    """
    affordable = max(history.budget + history.credit, 0.0)
    return affordable / (affordable + MAX_BUDGET)


def unspent(history: History) -> float:
    """credit / (budget · chunks), within [-1, 1]: share of all budget so far left over.

    0 before the first chunk; negative where more was spent than asked for.
    """
    allowed = max(history.budget, MIN_BUDGET) * max(history.chunks, 1)
    return max(min(history.credit / allowed, 1.0), -1.0)


HISTORY = FeatureGroup(
    name="history",
    prepare=lambda obs: obs.history,
    features=(loss_ema, cost_ema, allowance, unspent),
)
