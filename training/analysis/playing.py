"""Playing a recorded episode: a chooser decides, the session's own ledger cuts, gains are added up.

The loop is that of serving: the same features of history, the same `Decision`, the same ledger that
knows how many chunks are still to come, and no question asked about chunks that can't be learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.gates import Decision, within_budget
from ponderttt.adaptation.ledger import WINDOW
from ponderttt.adaptation.params import check_budget
from ponderttt.errors import InvalidRequestError
from training.analysis.gains import TraceEpisode
from training.environments.budgeted import HISTORY_COLUMNS, BudgetRules, bookkeeping_session


@dataclass(frozen=True, slots=True)
class Turn:
    """One chunk about which something must be decided.

    Args:
        decision: what a served gate is told.
        budget: highest mean cost, × forward.
        credit: budget not spent so far, × forward.
        position: of the chunk in its episode, from 0.
        decided: chunks of the episode that were decided about before this one.
        ahead: chunks of the episode that follow.
        rng: for choosers that draw; seeded per episode.
    """

    decision: Decision
    budget: float
    credit: float
    position: int
    decided: int
    ahead: int
    rng: np.random.Generator

    @property
    def allowance(self) -> float:
        """× forward: the mean cost at which this chunk and those ahead use the budget up."""
        return self.budget + self.credit / (1 + self.ahead)


class Chooser(Protocol):
    """Decides about a chunk; what it wants is then cut down to what the ledger allows."""

    def choose(self, turn: Turn) -> Action:
        """The action wanted."""
        ...


@dataclass(frozen=True, slots=True)
class Played:
    """What became of an episode of T chunks.

    Args:
        actions: T of them, as taken.
        gain: nats saved against SKIP throughout.
        tokens: of the episode.
        mean_cost: per chunk, × forward, by cost model.
        worst_window: highest mean cost of 64 chunks in a row (of all, where there are fewer), in
            the cost model of the budget, × forward.
        cut: chunks for which the ledger allowed less than was wanted.
    """

    actions: tuple[Action, ...]
    gain: float
    tokens: int
    mean_cost: Mapping[str, float]
    worst_window: float
    cut: int


def play(
    episode: TraceEpisode, chooser: Chooser, rules: BudgetRules, budget: float, seed: int = 0
) -> Played:
    """Run one episode to its end.

    Args:
        episode: of at least one chunk.
        chooser: decides.
        rules: cost models, and whether the ledger enforces the budget.
        budget: highest mean cost, × forward; need not be among `rules.budgets`.
        seed: of the draws, together with the episode's name.
    Raises:
        InvalidRequestError: an episode without a chunk, or a budget out of range.
    """
    check_budget("budget", budget)
    if not len(episode.gains):
        raise InvalidRequestError("episode", f"{episode.name!r} has no chunk")
    table = _Table(episode, rules, budget, seed)
    actions: list[Action] = []
    decided = cut = 0
    for position, learnable in enumerate(episode.learnable):
        action = Action.SKIP
        if learnable:
            turn = table.turn(position, decided)
            wanted = chooser.choose(turn)
            action = within_budget(wanted, turn.decision.allowed)
            cut += action is not wanted
            decided += 1
        rules.charge(table.session, action, float(episode.losses[position]))
        actions.append(action)
    totals = table.session.ledger.totals
    return Played(
        actions=tuple(actions),
        gain=float(episode.gains[np.arange(len(actions)), actions].sum()),
        tokens=int(episode.tokens.sum()),
        mean_cost={name: total / len(actions) for name, total in totals.items()},
        worst_window=worst_window([rules.cost(action) for action in actions]),
        cut=cut,
    )


def worst_window(costs: Sequence[float]) -> float:
    """The highest mean of 64 costs in a row; the mean of all where there are fewer."""
    width = min(WINDOW, len(costs))
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(costs), width)
    return float(windows.mean(-1).max())


class _Table:
    """One episode, and the session in which it is played."""

    def __init__(self, episode: TraceEpisode, rules: BudgetRules, budget: float, seed: int) -> None:
        self.session = bookkeeping_session("played")
        self._episode = episode
        self._rules = rules
        self._budget = budget
        self._seed = seed
        self._features = torch.tensor(episode.features).float()
        self._rng = np.random.default_rng([seed, crc32(episode.name.encode())])

    def turn(self, position: int, decided: int) -> Turn:
        """What the chooser is told of one chunk."""
        rules, session, budget = self._rules, self.session, self._budget
        ahead = len(self._features) - position - 1
        costs = rules.costs[rules.cost_model]
        mask = rules.allowed(session, budget, ahead).tolist()
        decision = Decision(
            loss=float(self._episode.losses[position]),
            features=lambda: self._row(position, rules.history(session, budget, ahead)),
            allowed=frozenset(action for action in Action if mask[action]),
            budget=budget,
            costs=costs,
            threshold=session.threshold,
            draw_key=f"{self._seed}/{self._episode.name}/{position}",
        )
        credit = session.ledger.credit(costs, budget)
        return Turn(decision, budget, credit, position, decided, ahead, self._rng)

    def _row(self, position: int, history: list[float]) -> Tensor:
        row = self._features[position].clone()
        row[HISTORY_COLUMNS] = torch.tensor(history)
        return row
