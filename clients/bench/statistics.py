"""Intervals of paired differences.

Units of one repository, or of one file, depend on each other. So clusters are what is counted,
never units: repositories where there are at least four, else files, else the units themselves.

From 20 clusters on, they are resampled: scipy's BCa bootstrap (Efron, 1987). With fewer that is too
narrow (a nominal 95% over four covers about 80%), and Student's t over the clusters is taken: of
four it covers 95% where they are alike in size and their means normal, 87% where those are skewed
and the sizes are not alike. Where all clusters say the same, neither knows anything of the others
that there may be: there is no interval.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ponderttt.errors import UnavailableError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ClusterBy = Literal["repository", "file", "unit"]
Method = Literal["t", "bootstrap"]
CONFIDENCE, RESAMPLES = 0.95, 9999
#: Clusters from which on they are resampled.
LEAST_RESAMPLED = 20
#: Fewer repositories say too little about others.
LEAST_REPOSITORIES = 4
# Numbers that the bootstrap holds at once, of 8 bytes; all resamples of a long load would be many
# gigabytes.
_HELD = 8_000_000


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference over paired units, with its 95% interval.

    Args:
        estimate: mean over all units.
        low, high: ends of the interval; None where there is but one cluster, or where all say the
            same.
        units, clusters: how many.
        method: of the interval; None where there is none.
    """

    estimate: float
    low: float | None
    high: float | None
    units: int
    clusters: int
    method: Method | None = None

    def as_dict(self) -> dict[str, float | int | str | None]:
        """For JSON."""
        return {
            "estimate": self.estimate, "low": self.low, "high": self.high,
            "units": self.units, "clusters": self.clusters, "method": self.method,
        }  # fmt: skip


def cluster_by(records: Sequence[Mapping[str, Any]]) -> ClusterBy:
    """What is resampled: `repository` where there are at least four, else `file`, else `unit`."""
    repositories = {record.get("repository") for record in records} - {None}
    if len(repositories) >= LEAST_REPOSITORIES:
        return "repository"
    files = {(record.get("repository"), record.get("file")) for record in records}
    named = all(record.get("file") is not None for record in records)
    return "file" if named and len(files) > 1 else "unit"


def cluster_of(record: Mapping[str, Any], by: ClusterBy, unit: Hashable) -> Hashable:
    """The cluster that a record belongs to."""
    match by:
        case "repository":
            return record["repository"]
        case "file":
            return record.get("repository"), record["file"]
        case "unit":
            return unit


def paired_difference(
    differences: Sequence[float], clusters: Sequence[Hashable], seed: int = 0
) -> Difference | None:
    """The mean of differences and its interval; None where there are none.

    Args:
        differences: one per unit.
        clusters: each unit's.
        seed: of the bootstrap.
    Raises:
        UnavailableError: scipy is not installed.
    """
    if not differences:
        return None
    sums: dict[Hashable, list[float]] = defaultdict(list)
    for cluster, value in zip(clusters, differences, strict=True):
        sums[cluster].append(float(value))
    estimate = sum(differences) / len(differences)
    none = Difference(estimate, None, None, len(differences), len(sums))
    if len(sums) == 1:
        return none
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise UnavailableError("intervals need scipy: `pip install 'ponderttt[bench]'`") from error
    totals, counts = [sum(v) for v in sums.values()], [len(v) for v in sums.values()]
    method: Method = "t" if len(sums) < LEAST_RESAMPLED else "bootstrap"
    low, high = _student(totals, counts) if method == "t" else _bootstrap(totals, counts, seed)
    # Means of equal values may differ in their last digits.
    if high - low <= 1e-9 * max(map(abs, differences)):
        return none
    return replace(none, low=low, high=high, method=method)


def _student(totals: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Ends of the interval of sum(totals) / sum(counts): Student's t on the delete-one jackknife.

    Source: Miller, "The jackknife – a review", Biometrika 61 (1974), section 2.
    """
    import numpy as np
    from scipy.stats import t

    above, below = np.asarray(totals, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    estimate, clusters = above.sum() / below.sum(), len(above)
    without_one = (above.sum() - above) / (below.sum() - below)
    variance = (clusters - 1) / clusters * np.square(without_one - estimate).sum()
    half = t.ppf((1 + CONFIDENCE) / 2, clusters - 1) * np.sqrt(variance)
    return float(estimate - half), float(estimate + half)


def _bootstrap(totals: Sequence[float], counts: Sequence[int], seed: int) -> tuple[float, float]:
    """Ends of the interval of sum(totals) / sum(counts) over resampled clusters."""
    import numpy as np
    from scipy.stats import DegenerateDataWarning, bootstrap

    def ratio(
        above: NDArray[np.float64], below: NDArray[np.float64], axis: int = -1
    ) -> NDArray[np.float64]:
        return np.asarray(above.sum(axis) / below.sum(axis))

    samples = (np.asarray(totals, dtype=np.float64), np.asarray(counts, dtype=np.float64))
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        # BCa has no answer where all resamples agree; the percentiles have.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = bootstrap(
            samples,
            ratio,
            n_resamples=RESAMPLES,
            paired=True,
            vectorized=True,
            batch=max(_HELD // len(totals), 1),
            axis=-1,
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    ends = np.array([result.confidence_interval.low, result.confidence_interval.high])
    if not np.isfinite(ends).all():
        tail = (1 - CONFIDENCE) / 2
        ends = np.quantile(result.bootstrap_distribution, [tail, 1 - tail])
    return float(ends[0]), float(ends[1])
