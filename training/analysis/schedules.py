"""Choosers: what a learned policy is compared with, and the policy itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.gates import Gate, ThresholdGate
from ponderttt.errors import InvalidRequestError
from training.analysis.gains import TraceEpisode
from training.analysis.outcomes import outcome_of, totals
from training.analysis.playing import Chooser, Turn, play
from training.environments.budgeted import BudgetRules

UPDATES = (Action.UPDATE_1, Action.UPDATE_2, Action.UPDATE_4)

#: Periods that are tried for the best fixed schedule.
PERIODS = (2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same action for every chunk, as the gate `fixed` is served.

    The ledger cuts it to the strongest action that the budget still pays for.
    """

    action: Action

    def choose(self, turn: Turn) -> Action:
        return self.action


@dataclass(frozen=True, slots=True)
class FrontLoaded:
    """One action from the start on while the budget pays for it, and nothing weaker after that."""

    action: Action

    def choose(self, turn: Turn) -> Action:
        return self.action if self.action in turn.decision.allowed else Action.SKIP


@dataclass(frozen=True, slots=True)
class Periodic:
    """One action for every `every`th chunk that can be learned, beginning at `offset`.

    A period that is too short for the budget learns early and then stops.
    """

    action: Action
    every: int
    offset: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InvalidRequestError("every", f"{self.every} is below 1")
        if not 0 <= self.offset < self.every:
            raise InvalidRequestError(
                "offset", f"{self.offset} lies outside [0, {self.every - 1}], one period"
            )

    def choose(self, turn: Turn) -> Action:
        return self.action if turn.decided % self.every == self.offset else Action.SKIP


@dataclass(frozen=True, slots=True)
class Random:
    """Draws SKIP or one of `actions` so that the expected cost is what is left of the budget.

    Of all distributions with that mean it takes the one of highest entropy, p ∝ exp(tilt · cost).
    With UPDATE_1 alone that is a coin. The mean follows `Turn.allowance`, so what could not be
    spent on chunks that can't be learned is spent on others, and the budget is met rather than
    just kept; in episodes of hundreds of chunks the ledger's windows still take 3 to 5% of it.

    Args:
        actions: one or more besides SKIP.
    """

    actions: tuple[Action, ...] = (Action.UPDATE_1,)

    def choose(self, turn: Turn) -> Action:
        choices = (Action.SKIP, *self.actions)
        costs = np.array([turn.decision.costs[action] for action in choices])
        return choices[int(turn.rng.choice(len(choices), p=tilted(costs, turn.allowance)))]


@dataclass(frozen=True, slots=True)
class Served:
    """A gate as it is served, e.g. `ThresholdGate()`, `RandomGate()` or a loaded policy."""

    gate: Gate

    def choose(self, turn: Turn) -> Action:
        return self.gate.choose(turn.decision)


#: Updates where the loss is high for the session, at the rate that the budget pays for.
THRESHOLD = Served(ThresholdGate())


@dataclass(frozen=True, slots=True)
class FromPolicy:
    """A policy: the likeliest action of those allowed, or one drawn in proportion.

    Args:
        logits: [B, 32] raw features → [B, 4]; `PolicyGate.logits`, or normaliser and network of a
            policy in training.
        sampled: draw, as in training, rather than take the likeliest, as in serving.
    """

    logits: Callable[[Tensor], Tensor]
    sampled: bool = False

    def choose(self, turn: Turn) -> Action:
        allowed = sorted(turn.decision.allowed)
        with torch.no_grad():
            logits = self.logits(turn.decision.features()[None])[0, allowed]
        if not self.sampled:
            return allowed[int(logits.argmax())]
        shares = torch.softmax(logits.double(), -1).numpy()
        return allowed[int(turn.rng.choice(len(allowed), p=shares))]


@dataclass(frozen=True, slots=True)
class PerBudget:
    """Another chooser for every budget, e.g. the best fixed schedule of each."""

    choosers: Mapping[float, Chooser]

    def choose(self, turn: Turn) -> Action:
        if turn.budget not in self.choosers:
            known = ", ".join(f"{budget:g}" for budget in self.choosers)
            raise InvalidRequestError("budget", f"{turn.budget:g} is not one of {known}")
        return self.choosers[turn.budget].choose(turn)


def tilted(values: NDArray[np.float64], mean: float) -> NDArray[np.float64]:
    """Probabilities of highest entropy with this mean; on the end value where it lies beyond.

    Args:
        values: [A], not all equal.
        mean: of the distribution.
    """
    if not values.min() < mean < values.max():
        end = values.argmin() if mean <= values.min() else values.argmax()
        return np.eye(len(values))[end]

    def shares(tilt: float) -> NDArray[np.float64]:
        weights = np.exp(tilt * values - (tilt * values).max())
        return np.asarray(weights / weights.sum())

    # So steep that all weight but 1e-13 lies on one end.
    steep = 30.0 / np.diff(np.unique(values)).min()
    ends = [float(shares(tilt) @ values) for tilt in (-steep, steep)]
    target = min(max(mean, ends[0]), ends[1])
    return shares(float(brentq(lambda tilt: shares(tilt) @ values - target, -steep, steep)))


def fixed_schedules() -> tuple[Chooser, ...]:
    """All that `best_fixed` tries: early, all the time, and at several periods, per action."""
    periodic = [
        Periodic(action, every, offset)
        for action in UPDATES
        for every in PERIODS
        for offset in (0, every // 2)
    ]
    plain = [kind(action) for action in UPDATES for kind in (Fixed, FrontLoaded)]
    return (*plain, *periodic)


def best_fixed(
    episodes: Sequence[TraceEpisode],
    rules: BudgetRules,
    budget: float,
    candidates: Iterable[Chooser] | None = None,
) -> Chooser:
    """The schedule of highest gain per token, as a mean over repositories; the first of equals.

    Args:
        episodes: of training; on those that it is judged on, a choice flatters itself.
        rules, budget: as for `play`.
        candidates: default `fixed_schedules()`.
    Raises:
        InvalidRequestError: no episode or no candidate.
    """
    tried = fixed_schedules() if candidates is None else tuple(candidates)
    if not episodes or not tried:
        raise InvalidRequestError("candidates" if episodes else "episodes", "give one or more")

    def score(chooser: Chooser) -> float:
        outcomes = [
            outcome_of("schedule", budget, e, play(e, chooser, rules, budget)) for e in episodes
        ]
        return float(totals(outcomes).per_token.mean())

    return max(tried, key=score)
