"""The oracle: the best actions in hindsight that the ledger would have let pass.

A multiple-choice knapsack: per chunk one action at most besides SKIP, over the episode a mean cost
within the budget, and the same for every 64 chunks in a row. A sequence that keeps both, the ledger
allows step by step, since it counts what is still ahead as skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.ledger import WINDOW
from training.analysis.gains import TraceEpisode
from training.analysis.playing import Played, Turn, play
from training.environments.budgeted import BudgetRules

#: Relative gap between the solution and the proven bound at which the search ends.
MIP_GAP = 1e-4

# The solver's rows hold to 1e-6, the ledger's sums to 1e-9.
_MARGIN = 1e-5


@dataclass(frozen=True, slots=True)
class Scripted:
    """Actions that were decided beforehand, one per chunk."""

    actions: tuple[Action, ...]

    def choose(self, turn: Turn) -> Action:
        return self.actions[turn.position]


@dataclass(frozen=True, slots=True)
class Oracle:
    """The best that was possible.

    Args:
        played: the actions, their gain and cost.
        bound: nats; nothing that the ledger allows gains more. Above `played.gain` by `MIP_GAP` of
            it at most, unless the time ran out.
    """

    played: Played
    bound: float


@dataclass(frozen=True, slots=True, eq=False)
class _Options:
    """V choices that may be worth their cost, in the order of the chunks.

    Args:
        chunk, action: [V] int64.
        gain, extra: [V] float64, nats, and × forward above SKIP.
    """

    chunk: NDArray[np.int64]
    action: NDArray[np.int64]
    gain: NDArray[np.float64]
    extra: NDArray[np.float64]


def oracle(
    episode: TraceEpisode, rules: BudgetRules, budget: float, time_limit: float = 60.0
) -> Oracle:
    """Solve one episode.

    Args:
        episode: of at least one chunk.
        rules: the cost model; the budget holds here whether `rules.enforced` is set or not.
        budget: highest mean cost, × forward.
        time_limit: seconds; then the best found so far is returned, and `bound` lies higher.
    Raises:
        InvalidRequestError: as `play`.
    """
    enforced = replace(rules, enforced=True)
    # Not before `play` has checked budget and episode.
    nothing = play(episode, Scripted((Action.SKIP,) * len(episode.gains)), enforced, budget)
    options = _options(episode, rules)
    if not len(options.gain):
        return Oracle(nothing, 0.0)
    extra = budget - rules.cost(Action.SKIP)
    bounds: list[float] = []
    for margin in (0.0, _MARGIN):
        actions, bound = _solve(options, len(episode.gains), extra, margin, time_limit)
        bounds.append(bound)
        played = play(episode, Scripted(actions), enforced, budget)
        if played.actions == actions:
            # Without the margin, since what bounds the narrower problem need not bound the other.
            return Oracle(played, max(bounds[0], played.gain))
    raise RuntimeError(f"{episode.name}: the ledger refused what the solver took for allowed")


def _options(episode: TraceEpisode, rules: BudgetRules) -> _Options:
    """All actions but those that gain no more than a cheaper one."""
    kept: list[tuple[int, int, float, float]] = []
    by_cost = sorted(Action, key=lambda action: (rules.cost(action), action))
    for chunk in np.flatnonzero(episode.learnable):
        best = 0.0
        for action in by_cost:
            gain = float(episode.gains[chunk, action])
            if gain > best:
                best = gain
                extra = rules.cost(action) - rules.cost(Action.SKIP)
                kept.append((int(chunk), int(action), gain, extra))
    chunks, actions, gains, extras = zip(*kept, strict=True) if kept else ((), (), (), ())
    return _Options(
        np.array(chunks, dtype=np.int64),
        np.array(actions, dtype=np.int64),
        np.array(gains, dtype=np.float64),
        np.array(extras, dtype=np.float64),
    )


def _solve(
    options: _Options, chunks: int, extra: float, margin: float, time_limit: float
) -> tuple[tuple[Action, ...], float]:
    """T actions, and the bound on the gain.

    Args:
        options: to choose from.
        chunks: T.
        extra: mean cost above SKIP that may be spent, × forward.
        margin: by which the sums stay below their limits.
    """
    # Largest gain 1: the solver's absolute gap (1e-6, fixed) must not matter either.
    unit = options.gain.max()
    starts = np.arange(max(chunks - WINDOW + 1, 0))[:, None]
    within = (options.chunk >= starts) & (options.chunk < starts + WINDOW)
    costs = csr_array(np.vstack([within, np.ones(len(options.chunk))]) * options.extra)
    limits = np.array([WINDOW] * len(starts) + [chunks]) * extra
    single = csr_array(np.arange(chunks)[:, None] == options.chunk, dtype=np.float64)
    result = milp(
        -options.gain / unit,
        integrality=np.ones(len(options.chunk)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(costs, -np.inf, np.maximum(limits - margin, 0.0)),
            LinearConstraint(single, -np.inf, 1.0),
        ],
        options={"mip_rel_gap": MIP_GAP, "time_limit": time_limit},
    )
    if result.x is None:
        raise RuntimeError(f"the solver found nothing: {result.message}")
    actions = [Action.SKIP] * chunks
    for index in np.flatnonzero(result.x > 0.5):
        actions[options.chunk[index]] = Action(int(options.action[index]))
    return tuple(actions), float(-result.mip_dual_bound * unit)
