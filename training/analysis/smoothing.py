"""Gains as far as features explain them, to train on.

What an update buys is measured on a hundred tokens here and there, so a single chunk's gain is
noise for the most part, and a policy that trains on a few hundred of them learns it by heart. Here
the gain per token of text that follows is a ridge regression on the chunk's features, its penalty
chosen by leaving out one repository after the other; where features explain nothing, what is left
is the action's mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ponderttt.adaptation.actions import Action
from training.analysis.gains import RewardConfig, TraceEpisode
from training.environments.budgeted import HISTORY_COLUMNS

# From hardly any penalty to one that leaves the mean only.
_PENALTIES = np.logspace(0, 6, 13)


def smoothed(
    episodes: Sequence[TraceEpisode], reward: RewardConfig, chunk_size: int
) -> list[TraceEpisode]:
    """The episodes with fitted gains; all else stays.

    Args:
        episodes: of two repositories or more.
        reward: gives the weight of the chunks that follow.
        chunk_size: tokens per chunk.
    """
    weights = [following(len(episode.losses), reward, chunk_size) for episode in episodes]
    rows = [e.learnable & (w > 0) for e, w in zip(episodes, weights, strict=True)]
    features = [np.delete(e.features, HISTORY_COLUMNS, axis=1) for e in episodes]
    groups = np.concatenate(
        [[e.repository] * int(r.sum()) for e, r in zip(episodes, rows, strict=True)]
    )
    x = np.concatenate([f[r] for f, r in zip(features, rows, strict=True)])
    w = np.concatenate([each[r] for each, r in zip(weights, rows, strict=True)])
    gains = np.concatenate([e.gains[r] for e, r in zip(episodes, rows, strict=True)])
    fitted = [np.zeros_like(episode.gains) for episode in episodes]
    for action in Action:
        if action is Action.SKIP:
            continue
        model = _fit(x, gains[:, action] / w, w, groups)
        for total, each, mine, row in zip(fitted, features, weights, rows, strict=True):
            total[row, action] = model.predict(each[row]) * mine[row]
    return [replace(e, gains=g) for e, g in zip(episodes, fitted, strict=True)]


def following(chunks: int, reward: RewardConfig, chunk_size: int) -> NDArray[np.float64]:
    """[T] tokens that follow each chunk of an episode of T, those further away counted less."""
    ahead = np.arange(chunks - 1, -1, -1)
    return np.array([sum(reward.retention**d for d in range(n)) for n in ahead]) * chunk_size


def _fit(
    x: NDArray[np.float64], y: NDArray[np.float64], w: NDArray[np.float64], groups: NDArray[np.str_]
) -> Any:
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import LeaveOneGroupOut
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = list(LeaveOneGroupOut().split(x, y, groups))
    ridge = RidgeCV(_PENALTIES, cv=folds, scoring="neg_mean_squared_error")
    return make_pipeline(StandardScaler(), ridge).fit(x, y, ridgecv__sample_weight=w / w.mean())
