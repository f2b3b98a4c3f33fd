"""What each action bought, as arrays per episode.

The gain of an action is what it buys on all the text that follows, against SKIP from the same
state, in nats. That text was not part of the update, so memorising the chunk
pays nothing. It is estimated from two places: the next chunk stands for the rest of its document
and for what lies inside later documents, the beginnings of later documents for those beginnings.
These are licences and imports in good part, where a first update gains many times what it gains
elsewhere; as a sample of all later text they would make an update look far better than it is. What
one update buys is in part what a later one would have bought as well, so a chunk that is n chunks
away counts retention**n.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ponderttt.adaptation.actions import Action
from ponderttt.errors import InvalidRequestError
from training.rollouts.traces import TraceHeader, TraceRecord


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """How far an update's worth is counted.

    Args:
        retention: what a chunk one further away counts less; 0: the next chunk alone.
        beginnings: share of later documents' chunks for which their beginnings stand.
        smooth: train on gains as far as features explain them; see `training.analysis.smoothing`.
    Raises:
        InvalidRequestError: outside [0, 1].
    """

    retention: float = 0.95
    beginnings: float = 1.0
    smooth: bool = False

    def __post_init__(self) -> None:
        for name in ("retention", "beginnings"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise InvalidRequestError(name, f"{value} lies outside [0, 1]")


@dataclass(frozen=True, slots=True, eq=False)
class TraceEpisode:
    """One recorded episode of T chunks.

    Args:
        name, repository: of the episode.
        gains: [T, 4] float64, nats saved on the text that follows, against SKIP; 0 for SKIP.
        learnable: [T] bool; other chunks allow SKIP only.
        losses: [T] float64, nats per token; 0 where a chunk had none.
        features: [T, 32] float64.
        tokens: [T] int64.
        near: [T] int64, chunks that follow in the same document.
    """

    name: str
    repository: str
    gains: NDArray[np.float64]
    learnable: NDArray[np.bool_]
    losses: NDArray[np.float64]
    features: NDArray[np.float64]
    tokens: NDArray[np.int64]
    near: NDArray[np.int64]


def trace_episodes(
    header: TraceHeader,
    records: Iterable[TraceRecord],
    reward: RewardConfig,
    inside: Sequence[float] | None = None,
) -> list[TraceEpisode]:
    """Episodes in the order of their first records.

    Args:
        header, records: of one file.
        reward: how much counts.
        inside: [4], as `inside_gains` gives it; None: that of these records.
    """
    found: dict[str, list[TraceRecord]] = defaultdict(list)
    for record in records:
        found[record.episode].append(record)
    if inside is None:
        inside = inside_gains([(header, [record for rows in found.values() for record in rows])])
    return [
        TraceEpisode(
            name=name,
            repository=str(header.episodes.get(name, {}).get("repository", name.split("#")[0])),
            gains=np.array([gains(record, reward, header.chunk_size, inside) for record in rows]),
            learnable=np.array([record.learnable for record in rows]),
            losses=np.array([record.loss or 0.0 for record in rows]),
            features=np.array([record.features for record in rows]),
            tokens=np.array([record.tokens for record in rows]),
            near=np.array([record.near for record in rows]),
        )
        for name, rows in found.items()
    ]


def gains(
    record: TraceRecord,
    reward: RewardConfig,
    chunk_size: int,
    inside: Sequence[float] = (0.0,) * len(Action),
) -> list[float]:
    """[4] nats, by action; a place that was not looked at counts 0.

    Args:
        record: of one chunk.
        reward: how much counts.
        chunk_size: tokens per chunk.
        inside: [4] nats per token, by action, inside a document, where the record cannot tell: the
            next chunk begins another document. What was not learned, or taken back, gains nothing.
    """
    total = [0.0] * len(Action)
    if not record.learnable:
        return total
    near = _weight(reward.retention, 0, record.near)
    far = _weight(reward.retention, record.near, record.near + record.far)
    within = far * (1 - reward.beginnings)
    far -= within
    if record.near:
        near += within
    else:
        kept = [failure is None for failure in record.failures]
        total = [within * chunk_size * g * k for g, k in zip(inside, kept, strict=True)]
    if not record.near and record.far:
        # The next chunk begins another document: one sample more of those.
        share = record.next_tokens / max(record.next_tokens + record.later_tokens, 1)
        near, far = far * share, far * (1 - share)
    if not record.later:
        near, far = near + far, 0.0
    for weight, losses, tokens in (
        (near, record.next, record.next_tokens),
        (far, record.later, record.later_tokens),
    ):
        for action, gain in zip(Action, _per_token(losses, tokens), strict=False):
            total[action] += weight * chunk_size * gain
    return total


def _per_token(losses: Sequence[float], tokens: int) -> list[float]:
    """Nats per token that each action saved; empty where nothing was looked at."""
    return [(losses[Action.SKIP] - losses[action]) / tokens for action in Action if losses]


def inside_gains(files: Sequence[tuple[TraceHeader, Sequence[TraceRecord]]]) -> list[float]:
    """[4] mean nats per token that the actions save on a next chunk of the same document.

    Of the training episodes of all files together; of all episodes, where none is of training.
    """
    every = [(_split(header, r.episode), r) for header, records in files for r in records]
    trained = [record for split, record in every if split == "train"]
    gained = [
        _per_token(record.next, record.next_tokens)
        for record in trained or [record for _, record in every]
        if record.learnable and record.near and record.next
    ]
    return [float(gain) for gain in np.mean(gained, axis=0)] if gained else [0.0] * len(Action)


def _split(header: TraceHeader, episode: str) -> object:
    return header.episodes.get(episode, {}).get("split")


def _weight(retention: float, start: int, end: int) -> float:
    return sum(retention**distance for distance in range(start, end))
