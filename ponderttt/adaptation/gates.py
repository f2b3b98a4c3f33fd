"""Gates: who decides how hard to ponder a chunk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ponderttt.adaptation.actions import Action, CostModel

# Nats. Without it the offset moves nothing where all losses are equal, and runs away.
_LEAST_SPREAD = 1e-6


@dataclass(slots=True)
class ThresholdState:
    """What the threshold gate remembers of a session.

    Args:
        chunks: decided so far.
        mean, spread: moving averages of the chunk loss and of its distance from that mean, nats.
        offset: the threshold's place, in spreads above the mean.
    """

    chunks: int = 0
    mean: float = 0.0
    spread: float = 0.0
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What a gate is told about one chunk.

    Args:
        loss: the chunk's own, nats per token.
        features: makes the 32 features; gates that don't need them don't call it.
        allowed: actions within the budget.
        budget: highest mean cost, × forward; None: no limit.
        costs: of the actions, in the request's cost model.
        threshold: the session's threshold state; the gate updates it.
        draw_key: names the draw of the gate `random`: the same key gives the same draw.
    """

    loss: float
    features: Callable[[], Tensor]
    allowed: frozenset[Action]
    budget: float | None
    costs: CostModel
    threshold: ThresholdState
    draw_key: str


class Gate(Protocol):
    """Chooses an action for one chunk; the ledger then cuts it down to what is allowed."""

    def choose(self, decision: Decision) -> Action:
        """The action wanted."""
        ...


def within_budget(wanted: Action, allowed: frozenset[Action]) -> Action:
    """The strongest allowed action that is no stronger than the one wanted."""
    return max(action for action in allowed if action <= wanted)


def update_rate(budget: float | None, costs: CostModel) -> float:
    """Share of chunks that can take UPDATE_1 while the mean cost stays at the budget."""
    if budget is None:
        return 1.0
    extra = costs[Action.UPDATE_1] - costs[Action.SKIP]
    return min(max((budget - costs[Action.SKIP]) / extra, 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class OffGate:
    """Never learns."""

    def choose(self, decision: Decision) -> Action:
        return Action.SKIP


@dataclass(frozen=True, slots=True)
class FixedGate:
    """The same action for every chunk."""

    action: Action

    def choose(self, decision: Decision) -> Action:
        return self.action


@dataclass(frozen=True, slots=True)
class RandomGate:
    """Draws between the two neighbouring actions whose mix costs the budget in the mean."""

    def choose(self, decision: Decision) -> Action:
        if decision.budget is None:
            return Action.UPDATE_4
        costs, budget = decision.costs, decision.budget
        for lower, upper in zip(list(Action), list(Action)[1:], strict=False):
            if budget <= costs[upper]:
                share = (budget - costs[lower]) / (costs[upper] - costs[lower])
                return upper if _uniform(decision.draw_key) < share else lower
        return Action.UPDATE_4


@dataclass(frozen=True, slots=True)
class ThresholdGate:
    """UPDATE_1 for chunks whose loss is high for this session; training-free.

    The threshold lies `offset` spreads above a moving average of the loss; the offset is steered
    up by every update and down by every skip, in the proportion that makes the share of updates
    settle at what the budget pays for. Budgets above UPDATE_1's cost update every chunk.
    """

    decay: float = 0.9
    gain: float = 0.5

    def choose(self, decision: Decision) -> Action:
        state, loss = decision.threshold, decision.loss
        rate = update_rate(decision.budget, decision.costs)
        if rate >= 1.0:
            update = True
        elif state.chunks == 0:
            update = rate > 0.0
        else:
            spread = max(state.spread, _LEAST_SPREAD)
            update = rate > 0.0 and loss > state.mean + state.offset * spread
        if state.chunks == 0:
            state.mean, state.spread = loss, 0.25 * abs(loss)
        else:
            state.spread += (1 - self.decay) * (abs(loss - state.mean) - state.spread)
            state.mean += (1 - self.decay) * (loss - state.mean)
            # What the ledger refuses must not raise the threshold.
            taken = update and Action.UPDATE_1 in decision.allowed
            state.offset += self.gain * (float(taken) - rate)
        state.chunks += 1
        return Action.UPDATE_1 if update else Action.SKIP


def _uniform(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2**56
