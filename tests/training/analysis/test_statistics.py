"""Intervals: against known ones, where they degenerate, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ponderttt.errors import InvalidRequestError
from training.analysis.statistics import (
    Interval,
    mean_interval,
    paired_difference,
    ratio_interval,
)


def test_a_mean_of_many_normal_values_has_the_interval_of_student() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert found.estimate == pytest.approx(values.mean())
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)
    assert found.n == 400


def test_about_95_of_100_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(1)
    found = [mean_interval(rng.normal(1.0, 1.0, 30)) for _ in range(150)]
    held = np.mean(
        [i.low is not None and i.high is not None and i.low <= 1.0 <= i.high for i in found]
    )
    assert 0.89 <= held <= 0.99


def test_pairing_takes_out_what_both_share() -> None:
    rng = np.random.default_rng(2)
    shared, noise = rng.normal(0, 100, 20), rng.normal(0.0, 0.1, 20)
    found = paired_difference(shared + 1.0 + noise, shared)
    assert found.low is not None
    assert found.high is not None
    assert 0.8 < found.low < 1.0 + noise.mean() < found.high < 1.2
    assert found.clear_of_zero
    assert not paired_difference(shared, rng.permutation(shared)).clear_of_zero


def test_equal_differences_leave_no_doubt() -> None:
    found = paired_difference([3.0, 5.0, 9.0], [1.0, 3.0, 7.0])
    assert found == Interval(2.0, 2.0, 2.0, 3)


def test_a_ratio_is_that_of_the_sums() -> None:
    rng = np.random.default_rng(3)
    below = rng.gamma(2.0, 10.0, 200)
    above = below * rng.normal(0.8, 0.1, 200)
    found = ratio_interval(above, below)
    ratio = above.sum() / below.sum()
    # The delta method (Fieller's is the same at this size).
    error = stats.sem(above - ratio * below) / below.mean()
    assert found.estimate == pytest.approx(ratio)
    assert found.low == pytest.approx(ratio - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(ratio + 1.96 * error, abs=0.2 * error)


def test_resamples_without_anything_to_gain_are_left_out() -> None:
    # One of four resamples of two draws the second repository twice: 0 of 0.
    found = ratio_interval([1.0, 0.0], [2.0, 0.0])
    assert found == Interval(0.5, 0.5, 0.5, 2)


def test_one_repository_says_nothing_of_others() -> None:
    found = mean_interval([1.5])
    assert found == Interval(1.5, None, None, 1)
    assert not found.clear_of_zero


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(4).normal(size=12)
    assert mean_interval(values, 7) == mean_interval(values, 7)
    assert mean_interval(values, 7) != mean_interval(values, 8)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0]]])
def test_what_is_no_sample_is_refused(values: list[float]) -> None:
    with pytest.raises(InvalidRequestError, match="one per repository"):
        mean_interval(values)


def test_samples_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="must be 2"):
        paired_difference([1.0, 2.0], [1.0])
    for below in ([0.0, 0.0], [2.0, -1.0]):
        with pytest.raises(InvalidRequestError, match="denominators"):
            ratio_interval([1.0, 1.0], below)
