"""pass@k: the chance that at least one of k samples passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from clients.bench.statistics import CONFIDENCE, paired_difference
from ponderttt.errors import UnavailableError


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate for one problem: 1 - C(n - c, k) / C(n, k).

    Args:
        samples: n, at least k.
        passed: c, how many of them passed.
        k: how many of them a user would try.
    Raises:
        ValueError: k lies outside [1, samples], or passed outside [0, samples].
    Source: Chen et al., arXiv:2107.03374, equation 1, in whole numbers.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}, but lies in [1, {samples}], the number of samples")
    if not 0 <= passed <= samples:
        raise ValueError(f"passed is {passed}, but lies in [0, {samples}]")
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean pass@k over problems, with its 95% interval.

    Args:
        k: of pass@k.
        value: the mean.
        low, high: ends of the interval, in [0, 1]; None where none can be given.
        method: `wilson` for Wilson's score interval, `bootstrap` or `t` over problems (see
            `clients.bench.statistics`); empty where there is none.
    """

    k: int
    value: float
    low: float | None
    high: float | None
    method: str


def estimate(counts: Sequence[tuple[int, int]], k: int, seed: int = 0) -> Estimate | None:
    """Mean pass@k; None where no problem has k samples.

    One sample per problem makes it a share, for which Wilson's interval is exact enough also near 0
    and 1. It is taken, too, where pass@k is 0 for all problems, or 1: problems are its trials then,
    since samples of one problem are alike. Else problems are resampled.

    Args:
        counts: samples and passed samples of every problem; those with fewer than k are left out.
        k: how many samples a user would try.
        seed: of the bootstrap.
    Raises:
        UnavailableError: scipy is not installed.
    """
    values = [pass_at_k(samples, passed, k) for samples, passed in counts if samples >= k]
    if not values:
        return None
    value = sum(values) / len(values)
    if all(samples == 1 for samples, _ in counts) or value in (0.0, 1.0):
        low, high = wilson(round(sum(values)), len(values))
        return Estimate(k, value, low, high, "wilson")
    whole = paired_difference(values, range(len(values)), seed)
    if whole is None or whole.low is None or whole.high is None:
        return Estimate(k, value, None, None, "")
    return Estimate(k, value, max(whole.low, 0.0), min(whole.high, 1.0), whole.method or "")


def wilson(passed: int, trials: int) -> tuple[float, float]:
    """Ends of the 95% score interval of a share.

    Raises:
        UnavailableError: scipy is not installed.
    """
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise UnavailableError("intervals need scipy: `pip install 'ponderttt[bench]'`") from error
    interval = binomtest(passed, trials).proportion_ci(CONFIDENCE, "wilson")
    return float(interval.low), float(interval.high)
