"""What the session went through before this chunk, and what it may still spend.

In `min` and `max` the value comes before the bound, so that a NaN is kept and reported.
"""

from __future__ import annotations

import math

from ponderttt.adaptation.features.group import FeatureGroup
from ponderttt.adaptation.observation import History
from ponderttt.adaptation.params import MAX_BUDGET

LEAST_COST = 0.1
HALF_WAY = 16


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
    """log(a) / log 12 with a = budget + credit / (1 + ahead): what a chunk may cost from here on.

    a is the mean cost at which this chunk and those ahead use the budget up. 0 = nothing is left
    to learn with, 0.44 = enough for UPDATE_1 on every chunk. Equal to the budget where a request
    begins; the budget alone would be a constant of the session.
    """
    rate = history.budget + history.credit / (1 + history.ahead)
    return math.log(max(rate, LEAST_COST)) / math.log(MAX_BUDGET)


def remaining(history: History) -> float:
    """ahead / (ahead + 16), in [0, 1): how much text is known to follow that learning would help.

    Half-way at 16 chunks; an editor's prompt, whose end is the cursor, has few.
    """
    return history.ahead / (history.ahead + HALF_WAY)


HISTORY = FeatureGroup(
    name="history",
    prepare=lambda obs: obs.history,
    features=(loss_ema, cost_ema, allowance, remaining),
)
