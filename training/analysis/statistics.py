"""Confidence intervals over repositories: BCa bootstrap (Efron, 1987), by scipy.

Repositories are resampled, not chunks or files: those of one repository depend on each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap

from ponderttt.errors import InvalidRequestError

CONFIDENCE = 0.95
RESAMPLES = 9999

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95% confidence interval.

    Args:
        estimate: from the sample.
        low, high: ends of the interval; None where one repository alone says nothing of others.
        n: repositories.
    """

    estimate: float
    low: float | None
    high: float | None
    n: int

    @property
    def clear_of_zero(self) -> bool:
        """Whether zero lies outside."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_interval(values: Sequence[float] | Array, seed: int = 0) -> Interval:
    """Of the mean of R values, one per repository.

    Raises:
        InvalidRequestError: no value, or one that is not finite.
    """
    return _interval((_checked("values", values),), _mean, seed)


def paired_difference(
    first: Sequence[float] | Array, second: Sequence[float] | Array, seed: int = 0
) -> Interval:
    """Of mean(first - second) over R repositories, in the same order in both.

    Raises:
        InvalidRequestError: of different length, empty, or not finite.
    """
    one, other = _paired(first, second)
    return _interval((one - other,), _mean, seed)


def ratio_interval(
    numerators: Sequence[float] | Array, denominators: Sequence[float] | Array, seed: int = 0
) -> Interval:
    """Of sum(numerators) / sum(denominators) over R repositories.

    Resamples whose denominators are all 0 count for nothing.

    Raises:
        InvalidRequestError: of different length, empty, not finite, or the denominators are
            negative or all 0.
    """
    above, below = _paired(numerators, denominators)
    if below.min() < 0 or below.sum() == 0:
        raise InvalidRequestError("denominators", "must be 0 or more, and one above 0")
    return _interval((above, below), _ratio, seed)


def _mean(values: Array, axis: int = -1) -> Array:
    return np.asarray(values.mean(axis))


def _ratio(above: Array, below: Array, axis: int = -1) -> Array:
    total = np.asarray(below.sum(axis))
    return np.divide(above.sum(axis), total, np.full(total.shape, np.nan), where=total > 0)


def _interval(samples: tuple[Array, ...], statistic: Callable[..., Array], seed: int) -> Interval:
    count = len(samples[0])
    estimate = float(statistic(*samples))
    if count == 1:
        return Interval(estimate, None, None, 1)
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        # BCa has no answer where all resamples agree, or some gave none; looked at below.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = bootstrap(
            samples,
            statistic,
            n_resamples=RESAMPLES,
            paired=True,
            vectorized=True,
            axis=-1,
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    ends = np.array([result.confidence_interval.low, result.confidence_interval.high])
    if not np.isfinite(ends).all():
        tail = (1 - CONFIDENCE) / 2
        ends = np.nanquantile(result.bootstrap_distribution, [tail, 1 - tail])
    return Interval(estimate, float(ends[0]), float(ends[1]), count)


def _checked(param: str, values: Sequence[float] | Array) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise InvalidRequestError(param, "give one or more finite values, one per repository")
    return array


def _paired(first: Sequence[float] | Array, second: Sequence[float] | Array) -> tuple[Array, Array]:
    one, other = _checked("first", first), _checked("second", second)
    if len(one) != len(other):
        raise InvalidRequestError(
            "second", f"{len(other)} values; must be {len(one)}, the same repositories as in first"
        )
    return one, other
