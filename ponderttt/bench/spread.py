"""Medians and quartiles of paired measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ponderttt.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Spread:
    """A median between its quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles (inclusive: of one value, that value).

    Raises:
        InvalidRequestError: no value, or one that is not finite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise InvalidRequestError("values", f"{list(values)}; give one or more finite figures")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio_spread(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Spread of ours / theirs round by round.

    Both sides of a round met the same state of the machine, so its drift cancels out of the ratio.

    Raises:
        InvalidRequestError: of different length, empty, not finite or not above 0.
    """
    if len(ours) != len(theirs):
        raise InvalidRequestError(
            "theirs", f"{len(theirs)} values; must be {len(ours)}, one for each of ours"
        )
    if any(value <= 0 for value in theirs):
        raise InvalidRequestError("theirs", f"{list(theirs)}; all must be above 0")
    return spread([one / other for one, other in zip(ours, theirs, strict=True)])
