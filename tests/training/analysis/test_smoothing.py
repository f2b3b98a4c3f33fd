"""Fitted gains: what features explain is kept, what they don't is the action's mean."""

from __future__ import annotations

import numpy as np
import pytest

from training.analysis.gains import RewardConfig, TraceEpisode
from training.analysis.smoothing import following, smoothed

REWARD = RewardConfig(retention=0.9, smooth=True)
CHUNKS, SIZE = 20, 32


def episodes(slope: float, noise: float) -> tuple[list[TraceEpisode], list[np.ndarray]]:
    """Six repositories; UPDATE_1 gains 0.01 + slope · feature per token, measured with noise."""
    rng = np.random.default_rng(0)
    weights = following(CHUNKS, REWARD, SIZE)
    made, true = [], []
    for number in range(6):
        features = rng.normal(size=(CHUNKS, 32))
        rates = np.zeros((CHUNKS, 4))
        rates[:, 1] = 0.01 + slope * features[:, 3]
        rates[:, 3] = -0.02
        measured = rates + noise * rng.normal(size=rates.shape) * (np.arange(4) > 0)
        made.append(
            TraceEpisode(
                name=f"r{number}#0", repository=f"r{number}",
                gains=measured * weights[:, None], learnable=np.arange(CHUNKS) != 5,
                losses=np.ones(CHUNKS), features=features,
                tokens=np.full(CHUNKS, SIZE), near=np.zeros(CHUNKS, dtype=np.int64),
            )
        )  # fmt: skip
        true.append(rates * weights[:, None])
    return made, true


def test_tokens_that_follow_count_less_the_further_away_they_are() -> None:
    assert following(3, RewardConfig(0.5), 10).tolist() == [15.0, 10.0, 0.0]


def test_noise_is_left_out_and_what_a_feature_explains_is_kept() -> None:
    noisy, true = episodes(slope=0.01, noise=0.01)
    fitted = smoothed(noisy, REWARD, SIZE)
    rows = noisy[0].learnable
    error = [
        np.mean([np.abs(e.gains[rows] - t[rows]).mean() for e, t in zip(some, true, strict=True)])
        for some in (noisy, fitted)
    ]
    assert error[1] < error[0] / 2
    drawn = np.concatenate([e.gains[rows, 1] for e in fitted])
    real = np.concatenate([t[rows, 1] for t in true])
    assert np.corrcoef(drawn, real)[0, 1] > 0.7


def test_where_features_explain_nothing_the_mean_is_left() -> None:
    noisy, _ = episodes(slope=0.0, noise=0.02)
    (fitted, *_) = smoothed(noisy, REWARD, SIZE)
    rates = fitted.gains[:-1, 1] / following(CHUNKS, REWARD, SIZE)[:-1]
    rates = np.delete(rates, 5)
    assert rates.mean() == pytest.approx(0.01, abs=0.006)
    assert rates.std() < 0.02 / 4


def test_what_cannot_be_learned_gains_nothing() -> None:
    noisy, _ = episodes(slope=0.005, noise=0.02)
    for before, after in zip(noisy, smoothed(noisy, REWARD, SIZE), strict=True):
        assert (after.gains[5] == 0).all()
        assert (after.gains[:, 0] == 0).all()
        assert (after.name, after.repository) == (before.name, before.repository)
        assert np.array_equal(after.features, before.features)
