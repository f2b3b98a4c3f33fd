"""What each action bought, as arrays per episode.

The gain of an action is what it buys on the text that follows, in nats per token, against SKIP
from the same state. That text was not part of the update, so memorising the chunk pays nothing.
`next` is what helps at once; `later`, the beginning of another document, is what carries over to
the rest of the repository.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ponderttt.adaptation.actions import Action
from training.rollouts.traces import TraceHeader, TraceRecord


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """Weights of the two places where an outcome was measured."""

    next_weight: float = 1.0
    later_weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class TraceEpisode:
    """One recorded episode of T chunks.

    Args:
        name, repository: of the episode.
        gains: [T, 4] float64, nats per token against SKIP; 0 for SKIP.
        learnable: [T] bool; other chunks allow SKIP only.
        losses: [T] float64, nats per token; 0 where a chunk had none.
        features: [T, 32] float64.
        tokens: [T] int64.
    """

    name: str
    repository: str
    gains: NDArray[np.float64]
    learnable: NDArray[np.bool_]
    losses: NDArray[np.float64]
    features: NDArray[np.float64]
    tokens: NDArray[np.int64]


def trace_episodes(
    header: TraceHeader, records: Iterable[TraceRecord], reward: RewardConfig
) -> list[TraceEpisode]:
    """Episodes in the order of their first records."""
    found: dict[str, list[TraceRecord]] = defaultdict(list)
    for record in records:
        found[record.episode].append(record)
    return [
        TraceEpisode(
            name=name,
            repository=str(header.episodes.get(name, {}).get("repository", name.split("#")[0])),
            gains=np.array([gains(record, reward) for record in rows]),
            learnable=np.array([record.learnable for record in rows]),
            losses=np.array([record.loss or 0.0 for record in rows]),
            features=np.array([record.features for record in rows]),
            tokens=np.array([record.tokens for record in rows]),
        )
        for name, rows in found.items()
    ]


def gains(record: TraceRecord, reward: RewardConfig) -> list[float]:
    """[4], by action; a place that was not looked at counts 0."""
    total = [0.0] * len(Action)
    for weight, losses, tokens in (
        (reward.next_weight, record.next, record.next_tokens),
        (reward.later_weight, record.later, record.later_tokens),
    ):
        for action in Action if losses else ():
            total[action] += weight * (losses[Action.SKIP] - losses[action]) / tokens
    return total
