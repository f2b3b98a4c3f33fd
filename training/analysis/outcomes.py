"""Outcomes of many runs, added up by repository and summed up by method and budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ponderttt.adaptation.actions import Action
from ponderttt.errors import InvalidRequestError
from training.analysis.gains import TraceEpisode
from training.analysis.playing import Played
from training.analysis.statistics import Interval, mean_interval, paired_difference, ratio_interval


@dataclass(frozen=True, slots=True)
class Outcome:
    """One method on one episode, under one budget and seed.

    Args:
        method, repository: names.
        budget: highest mean cost, × forward.
        gain: nats saved against SKIP throughout.
        tokens: of the episode.
        mean_cost: per chunk, × forward, by cost model.
        actions: as taken, one per chunk.
        worst_window: highest mean cost of 64 chunks in a row, × forward.
    """

    method: str
    budget: float
    repository: str
    gain: float
    tokens: int
    mean_cost: Mapping[str, float]
    actions: Sequence[Action]
    worst_window: float


def outcome_of(method: str, budget: float, episode: TraceEpisode, played: Played) -> Outcome:
    """What `play` gave, with its names."""
    return Outcome(
        method=method,
        budget=budget,
        repository=episode.repository,
        gain=played.gain,
        tokens=played.tokens,
        mean_cost=played.mean_cost,
        actions=played.actions,
        worst_window=played.worst_window,
    )


@dataclass(frozen=True, slots=True)
class MethodResult:
    """One method under one budget.

    Args:
        method, budget: whose.
        gain: nats per token against SKIP, mean over repositories.
        share: of the oracle's gain, all repositories together; None for live runs, which have no
            oracle, and where nothing was to be gained.
        mean_cost: per chunk, × forward, by cost model.
        worst_window: highest mean cost of 64 chunks in a row, × forward.
        actions: chunks by action, over all seeds.
        repositories: nats per token, by name.
    """

    method: str
    budget: float
    gain: Interval
    share: Interval | None
    mean_cost: Mapping[str, float]
    worst_window: float
    actions: Mapping[str, int]
    repositories: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Nats per token that one method saves more than another, mean over repositories."""

    method: str
    baseline: str
    budget: float
    difference: Interval


@dataclass(frozen=True, slots=True, eq=False)
class Totals:
    """[R] totals of R repositories over all their runs: nats, and tokens."""

    names: tuple[str, ...]
    gains: NDArray[np.float64]
    tokens: NDArray[np.float64]

    @property
    def per_token(self) -> NDArray[np.float64]:
        """[R] nats per token."""
        return self.gains / self.tokens


def totals(outcomes: Sequence[Outcome]) -> Totals:
    """Add up, repositories in the order of their names.

    Raises:
        InvalidRequestError: no outcome, or a repository without a token.
    """
    if not outcomes:
        raise InvalidRequestError("outcomes", "give one or more")
    names = tuple(sorted({outcome.repository for outcome in outcomes}))
    place = {name: index for index, name in enumerate(names)}
    index = [place[outcome.repository] for outcome in outcomes]
    gains, tokens = np.zeros(len(names)), np.zeros(len(names))
    np.add.at(gains, index, [outcome.gain for outcome in outcomes])
    np.add.at(tokens, index, [outcome.tokens for outcome in outcomes])
    if not tokens.all():
        raise InvalidRequestError("outcomes", f"{names[int(tokens.argmin())]!r} has no token")
    return Totals(names, gains, tokens)


def summarise(outcomes: Sequence[Outcome], ideal: Sequence[Outcome] | None = None) -> MethodResult:
    """Sum up one method under one budget.

    Args:
        outcomes: all of it, from any number of seeds.
        ideal: the oracle's, under the same budget on the same repositories.
    Raises:
        InvalidRequestError: no outcome, or the oracle's are of other repositories.
    """
    found = totals(outcomes)
    chunks = np.array([len(outcome.actions) for outcome in outcomes])
    counts = Counter(action for outcome in outcomes for action in outcome.actions)
    return MethodResult(
        method=outcomes[0].method,
        budget=outcomes[0].budget,
        gain=mean_interval(found.per_token),
        share=None if ideal is None else _share(found, totals(ideal)),
        mean_cost={
            model: float(np.average([outcome.mean_cost[model] for outcome in outcomes], 0, chunks))
            for model in outcomes[0].mean_cost
        },
        worst_window=max(outcome.worst_window for outcome in outcomes),
        actions={action.name: counts[action] for action in Action},
        repositories=dict(zip(found.names, found.per_token.tolist(), strict=True)),
    )


def compare(subject: MethodResult, others: Iterable[MethodResult]) -> tuple[Comparison, ...]:
    """Paired by repository.

    Raises:
        InvalidRequestError: the methods were not played on the same repositories.
    """
    found = []
    for other in others:
        if subject.repositories.keys() != other.repositories.keys():
            raise InvalidRequestError(other.method, "was played on other repositories")
        pairs = [(gain, other.repositories[name]) for name, gain in subject.repositories.items()]
        difference = paired_difference(*np.array(pairs).T)
        found.append(Comparison(subject.method, other.method, subject.budget, difference))
    return tuple(found)


def _share(found: Totals, ideal: Totals) -> Interval | None:
    if found.names != ideal.names:
        raise InvalidRequestError("ideal", "is of other repositories")
    if not ideal.gains.sum() > 0:
        return None
    # Several seeds on one side count as one.
    return ratio_interval(found.per_token * ideal.tokens, ideal.gains)
